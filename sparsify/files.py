"""Files that are whole or not there: written beside their place, then moved into it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def check_folder(path: str | os.PathLike[str]) -> None:
    """Raise FileNotFoundError unless the folder of a file that is to be written exists."""
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {Path(path).parent}. Make it first.")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the block a path to write to, and move what it wrote to `path`, at once, when it ends well.

    Whoever reads `path`, even after this process is killed or the machine stops, finds the old file or the new one.

    Example:
        >>> import tempfile
        >>> place = Path(tempfile.mkdtemp()) / "notes.txt"
        >>> with replacing(place) as partial:
        ...     _ = partial.write_text("whole")
        >>> place.read_text(), [p.name for p in place.parent.iterdir()]
        ('whole', ['notes.txt'])
    """
    place = Path(path)
    check_folder(place)
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, place)
    finally:
        partial.unlink(missing_ok=True)
