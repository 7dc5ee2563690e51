"""Sparsify and count every torchvision model: writes ZOO.md and says how long it took relative to one trace.

    python benchmarks/zoo.py [--write]

Weights stay on the meta device; detectors, whose shapes depend on data, are counted on a random image of real numbers.
"""

import argparse
import pathlib
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import fx, nn
from torchvision import models
from tqdm import tqdm

from passes import graphs, trace
from sparsify import FlopReport, flop_report, sparsify
from sparsify.cli import load_model

TARGET = pathlib.Path(__file__).with_name("ZOO.md")
HEAD = """# torchvision, every model

`python benchmarks/zoo.py --write` wrote this table: each of torchvision's models at 10% density (ERK), counted on one input.
Weights are those that a convolution or product consumes; all of them are masked. MACs are those of one inference.
"measured" marks models whose shapes depend on data: their MACs are those of one random image (a detector resizes it first).

"""


@dataclass(frozen=True)
class Row:
    """What was found of one model."""

    name: str
    inputs: str
    parameters: int
    report: FlopReport
    graphs: int
    seconds: float
    ratio: float  # of the time to that of one trace

    def cells(self) -> list[Any]:
        kind = "one graph" if self.graphs == 1 else f"{self.graphs} graphs in Python code"
        masked = [layer for layer in self.report.layers if layer.status == "masked"]
        return [
            self.name,
            self.inputs,
            f"{self.parameters:,}",
            len(masked),
            f"{self.report.density:.4f}",
            f"{self.report.dense_macs:,}",
            f"{self.report.inference_ratio:.4f}",
            kind + ", measured" * self.report.measured,
        ]


def inputs_of(name: str) -> tuple[str, Any]:
    """Return the input that a model is counted on, in words and as `flop_report` takes it."""
    if "raft" in name:
        shape = (1, 3, 224, 224)
        return "2 frames, 1x3x224x224", (torch.empty(shape, device="meta"), torch.empty(shape, device="meta"))
    if any(part in name for part in ("rcnn", "retinanet", "fcos", "ssd")):
        return "3x320x320", [torch.rand(3, 320, 320, generator=torch.Generator().manual_seed(0))]
    video = name in models.list_models(models.video)
    size = 112 if "r3d" in name or "mc3" in name or "r2plus1d" in name else 299 if "inception" in name else 224
    shape = (1, 3, 16, size, size) if video else (1, 3, size, size)
    return "x".join(map(str, shape)), shape


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a call returns and its duration in seconds."""
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def one_trace(model: nn.Module) -> None:
    """Trace a model once, as torch.fx does; where it cannot, trace its parts in both modes."""
    try:
        fx.symbolic_trace(model)
    except Exception:
        trace(model)


def measure(name: str) -> Row:
    """Sparsify and count one model."""
    words, inputs = inputs_of(name)
    model = load_model(name, device="cpu" if isinstance(inputs, list) else "meta").eval()
    reference = min(timed(lambda: one_trace(model))[1] for _ in range(2))
    (sparse, report), seconds = timed(lambda: (s := sparsify(model, density=0.1), flop_report(s, inputs)))
    size = sum(p.numel() for p in model.parameters())
    return Row(name, words, size, report, len(graphs(sparse)), seconds, seconds / reference)


def main() -> None:
    """Run all, print the table, and write it if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write the table to {TARGET.name}")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [measure(name) for name in tqdm(models.list_models())]
    columns = ["model", "input", "parameters", "masked", "density", "dense MACs", "sparse / dense", "capture"]
    table = tabulate([row.cells() for row in rows], columns, tablefmt="github", disable_numparse=True)
    print(table)
    slowest = max(rows, key=lambda row: row.seconds)
    print(
        f"\nsparsify + report over one trace: median {statistics.median(row.ratio for row in rows):.1f}, "
        f"slowest model {slowest.name} in {slowest.seconds:.1f} s"
    )
    if options.write:
        TARGET.write_text(HEAD + table + "\n")


if __name__ == "__main__":
    main()
