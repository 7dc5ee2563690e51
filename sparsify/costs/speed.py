"""The speed report: what a sparse model takes beside the dense one, in inference or in training, measured on this machine."""

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from passes.counting.inputs import forward_values
from passes.lowering.lower import left_in_torch
from passes.lowering.timing import layer_times
from passes.masking.layers import Masked, leaf_class
from passes.masking.mask import masks_of
from sparsify.costs.plots import plot_speed
from sparsify.costs.training_speed import in_turns, layer_steps, steps_of
from sparsify.saving.plain import fold, lower

_REASONS = {
    "sparse": "every output by itself: few weights are kept",
    "shared": "outputs share what they read: they keep the same, or most",
    "dots": "a single pixel",
}


@dataclass(frozen=True)
class LayerSpeed:
    """One layer, in inference or, with its gradients, in training.

    Attributes:
        name: its node, or its path where torch runs it.
        density: the share of its weights that is kept.
        kernel: "sparse", "shared" or "dots", or "torch"; in training "sparse" or "masked".
        reason: why that one.
        predicted: how many times faster than torch's dense layer by the model of the machine, 0 where it was not asked.
        dense_ms, sparse_ms: for one image, in training for all of a batch; 0 where torch runs it.
    """

    name: str
    density: float
    kernel: str
    reason: str
    predicted: float = 0.0
    dense_ms: float = 0.0
    sparse_ms: float = 0.0

    @property
    def measured(self) -> float:
        """How many times faster than torch's dense layer it is, 0 where torch runs it."""
        return self.dense_ms / self.sparse_ms if self.sparse_ms else 0.0


@dataclass(frozen=True)
class SpeedReport:
    """What `speed_report` returns. Times are medians, in milliseconds for all images of a batch."""

    model: str
    what: str  # "lowered", or "training step"
    machine: str
    threads: int
    torch: str
    dense_ms: float
    sparse_ms: float
    layers: tuple[LayerSpeed, ...]

    @property
    def speedup(self) -> float:
        """How many times faster the lowered model is."""
        return self.dense_ms / self.sparse_ms

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
                *(f"{v:.3f}" if v else "-" for v in (x.dense_ms, x.sparse_ms)),
                x.reason,
            ]
            for x in self.layers
        ]
        heads = ["layer", "density", "kernel", "predicted", "measured", "dense ms", "sparse ms", "reason"]
        table = tabulate(rows, heads, disable_numparse=True)
        facts = f"{self.model} on {self.machine}, {self.threads} threads, torch {self.torch}"
        total = f"{self.what}: dense {self.dense_ms:.2f} ms, sparse {self.sparse_ms:.2f} ms, {self.speedup:.2f} times faster"
        return f"{table}\n\n{facts}\n{total}"


def speed_report(
    model: nn.Module,
    inputs: Any,
    *,
    training: bool = False,
    backend: str = "auto",
    repeats: int = 15,
    progress: Callable[[str], object] | None = None,
) -> SpeedReport:
    """Measure a sparse model against the same model dense, whole and layer by layer, on this machine.

    Sparse kernels pay on CPUs, several times where a tenth of the weights is kept. Times vary from moment to moment: the two
    models take turns, and medians count.

    Args:
        model: what `lower` takes, or a masked model for training; it is not changed.
        inputs: what `flop_report` takes; in training the size of the batch matters.
        training: whether to measure a forward and backward pass, with the kernels that `use_kernels` chose, instead of the
            lowered model. Dense is torch's eager mode, in the layout that the model has.
        backend: what `lower` takes.
        repeats: how often each is run.
        progress: called with what is being done.

    Returns:
        The report; `print` shows a table.

    Raises:
        TypeError, ValueError: as `lower` does, or `repeats` is less than 1; in training, the model has no masks.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
        >>> report = speed_report(model, (1, 3, 16, 16), repeats=2)
        >>> len(report.layers), report.speedup > 0
        (2, True)
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats}.")
    say = progress or (lambda text: None)
    measure = _training if training else _lowered
    dense_ms, sparse_ms, layers = measure(model, inputs, backend, repeats, say)
    return SpeedReport(
        model=(leaf_class(model) if isinstance(model, Masked) else type(model)).__name__,
        what="training step" if training else "lowered",
        machine=processor(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        dense_ms=dense_ms,
        sparse_ms=sparse_ms,
        layers=tuple(layers),
    )


Measured = tuple[float, float, list[LayerSpeed]]


def _lowered(model: nn.Module, inputs: Any, backend: str, repeats: int, say: Callable[[str], object]) -> Measured:
    say("lowering")
    lowered = lower(model, inputs, backend=backend)
    dense = fold(model) if masks_of(model) else model
    args, kwargs = forward_values(dense, inputs)
    with torch.no_grad():
        whole = in_turns([lambda: dense(*args, **kwargs), lambda: lowered(*args, **kwargs)], repeats, say)
    say("layer by layer")
    layers = [
        LayerSpeed(
            name=t.choice.name,
            density=t.choice.density,
            kernel=t.choice.kernel,
            reason=_REASONS[t.choice.kernel],
            predicted=t.choice.dense_cycles / max(t.choice.cycles, 1.0),
            dense_ms=1e3 * t.torch_seconds,
            sparse_ms=1e3 * t.seconds,
        )
        for t in layer_times(lowered, args, kwargs, repeats)
    ]
    for path, why in left_in_torch(lowered).items():
        weight: Any = lowered.get_submodule(path).weight
        layers.append(LayerSpeed(path, float((weight != 0).float().mean()), "torch", why))
    return 1e3 * whole[0], 1e3 * whole[1], layers


def _training(model: nn.Module, inputs: Any, backend: str, repeats: int, say: Callable[[str], object]) -> Measured:
    dense = fold(model)
    args, kwargs = forward_values(dense, inputs)
    whole = in_turns(steps_of(model, dense, args, kwargs), repeats, say)
    layers = []
    for name, choice, *passes in layer_steps(model, dense, args, kwargs):
        say(name)
        seconds = in_turns(passes, repeats, lambda text: None)
        mask: Any = model.get_submodule(f"{name}.weight_mask".lstrip("."))
        times = (choice.predicted, *(1e3 * s for s in seconds))
        layers.append(LayerSpeed(name, mask.density, choice.kernel, choice.reason, *times))
    return 1e3 * whole[0], 1e3 * whole[1], layers


def processor() -> str:
    """Return the name of the processor, and the instructions that torch uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
