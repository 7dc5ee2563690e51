"""The command line: sparsify a model, print its report, and look at its graph."""

from sparsify.cli.commands import main
from sparsify.cli.models import load_model

__all__ = ["load_model", "main"]
