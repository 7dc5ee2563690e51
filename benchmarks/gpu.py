"""Every check and measure that wants a GPU, in one command of less than 8 minutes; writes RESULTS-GPU.md.

    python benchmarks/gpu.py [--rehearse]

Needs torch, torchvision and fvcore, and nothing built. Without a GPU it says so and does nothing; `--rehearse` runs every piece
on the CPU, small, and writes nothing.
"""

import argparse
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from gpu_checks import CHECKS
from gpu_speed import FULL, SMALL, Size, memory_lines, selection_rows, step_rows, update_rows
from tabulate import tabulate
from workload import Row, shown

TARGET = Path(__file__).parent / "RESULTS-GPU.md"
MEASURES: tuple[Callable[[Size, torch.device], list[Any]], ...] = (step_rows, update_rows, selection_rows, memory_lines)


def check_table(device: torch.device) -> tuple[str, int]:
    """Run the checks; return their table, and how many failed."""
    rows, failed = [], 0
    for check in CHECKS:
        start = time.perf_counter()
        try:
            seen = f"ok: {check(device)}"
        except Exception as error:  # the others are to run
            traceback.print_exc()
            seen, failed = f"FAILED: {type(error).__name__}: {error}".splitlines()[0], failed + 1
        rows.append((check.__name__.replace("_", " "), seen, f"{time.perf_counter() - start:.1f}"))
    return tabulate(rows, ["check", "seen", "seconds"], "github", disable_numparse=True), failed


def measure_table(size: Size, device: torch.device) -> tuple[str, int]:
    """Take the measures; return them as text, and how many failed."""
    rows, lines, failed = [], [], 0
    for measure in MEASURES:
        try:
            for found in measure(size, device):
                (rows if isinstance(found, Row) else lines).append(found)
        except Exception as error:
            traceback.print_exc()
            lines.append(f"{measure.__name__} FAILED: {type(error).__name__}: {error}".splitlines()[0])
            failed += 1
    cells = [(r.name, r.goal, shown(r.ratio), f"{r.ratio.ms:.2f} / {r.ratio.base_ms:.2f}") for r in rows]
    table = tabulate(cells, ["measure", "goal", "ratio (quartiles)", "ms"], "github", disable_numparse=True)
    return "\n".join([table, "", *(f"- {line}" for line in lines)]), failed


def main() -> int:
    """Run everything on the GPU, or rehearse it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="run every piece on the CPU, small")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        print("There is no GPU here, so nothing was checked. --rehearse runs every piece on the CPU.")
        return 0
    warnings.simplefilter("ignore")
    device = torch.device("cpu" if options.rehearse else "cuda")
    name = "a CPU, in rehearsal" if options.rehearse else torch.cuda.get_device_name()
    head = f"# On {name}\n\n`make gpu`, torch {torch.__version__}, torchvision {torchvision.__version__}."
    checks, failed = check_table(device)
    measures, unmeasured = measure_table(SMALL if options.rehearse else FULL, device)
    text = f"{head}\n\n{checks}\n\n{measures}\n"
    print(text)
    if not options.rehearse:
        TARGET.write_text(text)
    return int(failed + unmeasured > 0)


if __name__ == "__main__":
    sys.exit(main())
