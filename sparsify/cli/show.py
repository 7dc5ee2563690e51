"""Show: tables that fit the window and colour what is masked, and how far something has come. Plain where it is piped."""

import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from termcolor import colored
from tqdm import tqdm

from sparsify.costs.report import FlopReport, rendered

Item = TypeVar("Item")
_PATIENCE = 2.0  # seconds, after which progress is shown
_LEAST = 18  # letters that are left of a name


def report_text(report: FlopReport) -> str:
    """Return a report as text: as `print` shows it where it goes to a file, and for a window in its width and with colours."""
    if not sys.stdout.isatty():
        return str(report)
    heads, rows, summary = report.table()
    width = shutil.get_terminal_size().columns
    for column in _SPARE:  # what the others say too goes first
        if _width(heads, rows) <= width:
            break
        at = heads.index(column)
        heads, rows = heads[:at] + heads[at + 1 :], [row[:at] + row[at + 1 :] for row in rows]
    over = _width(heads, rows) - width
    longest = max(len(str(row[0])) for row in rows)
    rows = [(_shortened(str(row[0]), max(_LEAST, longest - max(0, over))), *row[1:]) for row in rows]
    at = heads.index("density")
    shown = [(*row[:at], _coloured(row[at]), *row[at + 1 :]) for row in rows]
    return "\n".join([rendered(heads, shown), "", *summary])


_SPARE = ("op", "of", "weight", "dense MACs", "kept")


def _width(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> int:
    return len(rendered(heads, rows).partition("\n")[0])


def _shortened(name: str, most: int) -> str:
    """Return a name with its middle left out, since the ends of paths tell layers apart."""
    if len(name) <= most:
        return name
    first = (most - 1) // 3
    return f"{name[:first]}…{name[len(name) - (most - 1 - first) :]}"


def _coloured(density: str) -> str:
    if "(" in density or density.startswith("1.0000"):
        return colored(density, "dark_grey")
    return colored(density, "green" if float(density) < 0.2 else "yellow")


def progress(items: Iterable[Item], name: str) -> Iterable[Item]:
    """Go through items; if it takes long, a bar on the terminal says how far it is."""
    return tqdm(items, desc=name, delay=_PATIENCE, leave=False, disable=None, file=sys.stderr)


def stages(*, lines: bool) -> Callable[[str], None]:
    """Return what says which stage something is in: on a terminal in one line, which "" clears; elsewhere in `lines` or not."""
    terminal = sys.stderr.isatty()

    def say(text: str) -> None:
        if terminal:
            print(f"{text:<30}", end="\r", file=sys.stderr, flush=True)
        elif lines and text:
            print(text, file=sys.stderr, flush=True)

    return say
