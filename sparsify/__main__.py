"""`python -m sparsify`: the command line."""

import sys

from sparsify.cli import main

if __name__ == "__main__":
    sys.exit(main())
