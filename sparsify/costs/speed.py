"""The speed report: what a lowered model takes beside the dense one, measured on this machine."""

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from passes.counting.inputs import forward_values
from passes.lowering.lower import left_in_torch
from passes.lowering.timing import layer_times
from passes.masking.mask import masks_of
from sparsify.costs.plots import plot_speed
from sparsify.saving.plain import fold, lower

_REASONS = {
    "sparse": "every output by itself: few weights are kept",
    "shared": "four outputs share what they read: most weights are kept",
    "dots": "a single pixel",
}


@dataclass(frozen=True)
class LayerSpeed:
    """One layer.

    Attributes:
        name: its node, or its path where torch runs it.
        density: the share of its weights that is kept.
        kernel: "sparse", "shared" or "dots", or "torch".
        reason: why that one.
        predicted: how many times faster than torch's dense layer by the model of the machine, 0 where it was not asked.
        dense_ms, lowered_ms: for one image; 0 where torch runs it.
    """

    name: str
    density: float
    kernel: str
    reason: str
    predicted: float = 0.0
    dense_ms: float = 0.0
    lowered_ms: float = 0.0

    @property
    def measured(self) -> float:
        """How many times faster than torch's dense layer it is, 0 where torch runs it."""
        return self.dense_ms / self.lowered_ms if self.lowered_ms else 0.0


@dataclass(frozen=True)
class SpeedReport:
    """What `speed_report` returns. Times are medians, in milliseconds for all images of a batch."""

    model: str
    machine: str
    threads: int
    torch: str
    dense_ms: float
    lowered_ms: float
    layers: tuple[LayerSpeed, ...]

    @property
    def speedup(self) -> float:
        """How many times faster the lowered model is."""
        return self.dense_ms / self.lowered_ms

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        layers = [{**asdict(layer), "measured": layer.measured} for layer in self.layers]
        return {**asdict(self), "speedup": self.speedup, "layers": layers}

    def plot(self, path: str) -> None:
        """Draw predicted and measured speed of every layer into a file; needs the extra `plots`."""
        rows = [(layer.name, layer.predicted, layer.measured) for layer in self.layers if layer.measured]
        plot_speed(rows, f"{self.model}: {self.speedup:.2f} times faster, {self.machine}", path)

    def __str__(self) -> str:
        """Return a table and the total."""
        rows = [
            [
                x.name,
                f"{x.density:.3f}",
                x.kernel,
                *(f"{v:.2f}x" if v else "-" for v in (x.predicted, x.measured)),
                *(f"{v:.3f}" if v else "-" for v in (x.dense_ms, x.lowered_ms)),
                x.reason,
            ]
            for x in self.layers
        ]
        heads = ["layer", "density", "kernel", "predicted", "measured", "dense ms", "lowered ms", "reason"]
        table = tabulate(rows, heads, disable_numparse=True)
        facts = f"{self.model} on {self.machine}, {self.threads} threads, torch {self.torch}"
        total = f"whole model: dense {self.dense_ms:.2f} ms, lowered {self.lowered_ms:.2f} ms, {self.speedup:.2f} times faster"
        return f"{table}\n\n{facts}\n{total}"


def speed_report(
    model: nn.Module, inputs: Any, *, backend: str = "auto", repeats: int = 15, progress: Callable[[str], object] | None = None
) -> SpeedReport:
    """Measure a model lowered against the same model dense, whole and layer by layer, on this machine.

    Sparse kernels pay on CPUs, several times where a tenth of the weights is kept. Times vary from moment to moment: the two
    models take turns, and medians count.

    Args:
        model: what `lower` takes; it is not changed.
        inputs: what `flop_report` takes.
        backend: what `lower` takes.
        repeats: how often each is run.
        progress: called with what is being done.

    Returns:
        The report; `print` shows a table.

    Raises:
        TypeError, ValueError: as `lower` does, or `repeats` is less than 1.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
        >>> report = speed_report(model, (1, 3, 16, 16), repeats=2)
        >>> len(report.layers), report.speedup > 0
        (2, True)
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats}.")
    say = progress or (lambda text: None)
    say("lowering")
    lowered = lower(model, inputs, backend=backend)
    dense = fold(model) if masks_of(model) else model
    args, kwargs = forward_values(dense, inputs)
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for turn in range(repeats + 1):  # the first one warms up
            say(f"round {turn} of {repeats}")
            for side, one in zip(times, (dense, lowered), strict=True):
                begin = time.perf_counter()
                one(*args, **kwargs)
                side.append(time.perf_counter() - begin)
    say("layer by layer")
    layers = [
        LayerSpeed(
            name=t.choice.name,
            density=t.choice.density,
            kernel=t.choice.kernel,
            reason=_REASONS[t.choice.kernel],
            predicted=t.choice.dense_cycles / max(t.choice.cycles, 1.0),
            dense_ms=1e3 * t.torch_seconds,
            lowered_ms=1e3 * t.seconds,
        )
        for t in layer_times(lowered, args, kwargs, repeats)
    ]
    for path, why in left_in_torch(lowered).items():
        weight: Any = lowered.get_submodule(path).weight
        layers.append(LayerSpeed(path, float((weight != 0).float().mean()), "torch", why))
    return SpeedReport(
        model=type(model).__name__,
        machine=processor(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        dense_ms=1e3 * median(times[0][1:]),
        lowered_ms=1e3 * median(times[1][1:]),
        layers=tuple(layers),
    )


def processor() -> str:
    """Return the name of the processor, and the instructions that torch uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
