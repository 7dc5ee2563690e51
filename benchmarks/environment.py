"""An environment of its own for packages that do not fit beside this project's, made on first use."""

import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path


def python_of(folder: Path) -> Path:
    """Return the interpreter of an environment."""
    return folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"


def build(folder: Path, packages: Sequence[str], imports: Sequence[str]) -> str:
    """Make an environment where it is absent or incomplete; return what went wrong, "" if nothing did.

    Args:
        folder: where it lies.
        packages: what pip installs.
        imports: modules that can be imported where it is complete.
    """
    python = python_of(folder)
    if _runs([python, "-c", "import " + ", ".join(imports)]):
        return ""
    print(f"Installing {' '.join(packages)} into {folder.name}, which takes minutes.", file=sys.stderr)
    try:
        venv.create(folder, with_pip=True, clear=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"no environment could be made ({error})."
    installed = _runs([python, "-m", "pip", "install", "--quiet", *packages])
    return "" if installed else "pip could not install them (see above)."


def _runs(command: list[str | Path]) -> bool:
    quiet = subprocess.DEVNULL if "-c" in command else None
    try:
        return subprocess.run(command, stdout=quiet, stderr=quiet).returncode == 0
    except OSError:
        return False


def write_section(path: Path, heading: str, text: str) -> None:
    """Replace a section of a Markdown file, which begins with its heading and ends before the next, or add it at the end."""
    before, _, after = path.read_text().partition(heading)
    _, found, rest = after.partition("\n## ")
    path.write_text(f"{before.rstrip()}\n\n{text.rstrip()}\n{found}{rest}")
