"""Files that are whole or not there: written beside their place, then moved into it."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path


def check_folder(path: str | os.PathLike[str]) -> None:
    """Raise FileNotFoundError unless the folder of a file that is to be written exists."""
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {Path(path).parent}. Make it first.")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the block a path to write to, and move what it wrote to `path`, at once, when it ends well.

    Whoever reads `path`, even after this process is killed or the machine stops, finds the old file or the new one. It has
    the old one's mode, or that of any new file. For a link, the file that it leads to is replaced.

    Example:
        >>> import tempfile
        >>> place = Path(tempfile.mkdtemp()) / "notes.txt"
        >>> with replacing(place) as partial:
        ...     _ = partial.write_text("whole")
        >>> place.read_text(), [p.name for p in place.parent.iterdir()]
        ('whole', ['notes.txt'])
    """
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device, which cannot be replaced
        yield Path(path)
        return
    place = Path(os.path.realpath(path))
    check_folder(place)
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = (place if place.exists() else partial).stat().st_mode
        yield partial
        partial.chmod(stat.S_IMODE(mode))
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, place)
    finally:
        partial.unlink(missing_ok=True)
