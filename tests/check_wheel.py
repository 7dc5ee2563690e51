"""Build the wheel, install it outside the checkout and use it there: the last step of the gate."""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
USE = """
import torch, passes, sparsify
assert not sparsify.__file__.startswith({root!r}), sparsify.__file__
model = sparsify.sparsify(torch.nn.Sequential(torch.nn.Linear(8, 8)), density=0.5)
print("wheel: sparsify and passes import from", sparsify.__path__[0], "with density", model.updater.densities)
"""


def main() -> None:
    """Fail loudly unless the wheel works on its own."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", folder, str(ROOT)], check=True, stdout=-3)
        (wheel,) = Path(folder).glob("sparsify_fx-*.whl")
        # The wheel goes into a folder of its own; torch and the rest come from the environment that runs this.
        target = Path(folder) / "site"
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
        subprocess.run(install, check=True)
        code = f"import sys; sys.path.insert(0, {str(target)!r})" + USE.format(root=str(ROOT))
        subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=folder)


if __name__ == "__main__":
    main()
