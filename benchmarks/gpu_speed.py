"""What sparse training costs on a GPU: ratios taken side by side, and the device's own measures. Runs on a CPU too, small."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from workload import Row, interleave, ratio

from sparsify import RigL, Static, sparsify
from sparsify.methods.selection import select


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    models: dict[str, tuple[int, int]]  # {torchvision model: (batch, image size)}
    weights: int  # of the layer that is selected from
    rounds: int
    ways: tuple[str, ...] = ("eager", "compiled")


FULL = Size({"resnet50": (256, 224), "vit_b_16": (128, 224)}, 1 << 22, 10)
SMALL = Size({"resnet18": (2, 32)}, 1 << 16, 2)


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(device: torch.device, call: Callable[[], object]) -> Callable[[], float]:
    """Turn a call into a case of `interleave`: the seconds that the device takes for it."""

    def case() -> float:
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        return time.perf_counter() - start

    return case


class Training:
    """A model in bfloat16 and channels_last with its optimizer and its one batch."""

    def __init__(self, model: nn.Module, size: tuple[int, int], device: torch.device) -> None:
        self.device = device
        self.model = model.to(device).to(memory_format=torch.channels_last)
        count, pixels = size
        images = torch.randn(count, 3, pixels, pixels, device=device)
        self.images = images.to(memory_format=torch.channels_last)
        self.labels = torch.arange(count, device=device) % 10
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, foreach=True)
        self.call: Callable[[Tensor], Tensor] = self.model

    def gradients(self) -> None:
        """Zero the gradients, run forward and backward."""
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = F.cross_entropy(self.call(self.images), self.labels)
        loss.backward()

    def step(self) -> None:
        """One whole training step."""
        self.gradients()
        self.optimizer.step()


def _trainings(name: str, size: Size, device: torch.device) -> dict[str, Training]:
    build = models.get_model_builder(name)
    dense = build(num_classes=10)
    made = {"dense": dense, "masked": sparsify(dense, 0.1, method=Static())}
    return {key: Training(model, size.models[name], device) for key, model in made.items()}


def step_rows(size: Size, device: torch.device) -> list[Row]:
    """Time the training step, masked over dense, in the ways of a size; goal 1.01."""
    rows = []
    for name in size.models:
        for how in size.ways:
            sides = _trainings(name, size, device)
            sides["masked"].model.updater.attach(sides["masked"].optimizer, total_steps=1_000_000)
            for side in sides.values():
                side.call = torch.compile(side.model) if how == "compiled" else side.model
            seconds = interleave({key: timed(device, side.step) for key, side in sides.items()}, size.rounds)
            rows.append(Row(f"{name} {how} step: masked / dense", "<= 1.01", ratio(seconds, "masked", "dense")))
    return rows


def update_rows(size: Size, device: torch.device) -> list[Row]:
    """Time what follows the backward pass where that is an update, over the optimizer's step; goal 2 ms."""
    rows = []
    for name in size.models:
        model = sparsify(models.get_model_builder(name)(num_classes=10), 0.1, method=RigL(interval=2))
        side = Training(model, size.models[name], device)
        model.updater.attach(side.optimizer, total_steps=1_000_000)
        cases = {"step": lambda side=side: _after_gradients(side), "update": lambda side=side: _after_gradients(side)}
        seconds = interleave(cases, size.rounds)  # every second step is an update
        rows.append(Row(f"{name}: update / optimizer step", "<= 2 ms", ratio(seconds, "update", "step")))
    return rows


def _after_gradients(side: Training) -> float:
    side.gradients()
    return timed(side.device, side.optimizer.step)()


def selection_rows(size: Size, device: torch.device) -> list[Row]:
    """Time the selection that updates use over one by a threshold that two histograms find."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(size.weights, generator=generator).to(device)
    among = torch.ones(size.weights, dtype=torch.bool, device=device)
    rows = []
    for kept in (0.1, 0.5):
        k = int(kept * size.weights)
        if not torch.equal(select(scores, k, among), by_histograms(scores.abs(), k)):
            raise AssertionError(f"selection by histograms differs at {kept}")
        cases = {
            "now": timed(device, lambda k=k: select(scores, k, among)),
            "histograms": timed(device, lambda k=k: by_histograms(scores.abs(), k)),
        }
        seconds = interleave(cases, size.rounds)
        rows.append(Row(f"select {kept:g} of {size.weights:,}: topk / two histograms", "", ratio(seconds, "now", "histograms")))
    return rows


def by_histograms(scores: Tensor, k: int) -> Tensor:
    """Mark the k highest of scores that are not negative, ties by the lowest index, in two passes of fixed shape.

    Bits of such floats are ordered as their values are: the first pass counts their upper halves, the second the lower halves
    of those at the threshold.
    """
    bits = scores.view(torch.int32).long()  # (n,)
    upper, lower = bits >> 16, bits & 0xFFFF
    edge, missing = _edge(upper, torch.ones_like(bits), torch.full((), k, device=bits.device))
    inside = upper == edge
    low, missing = _edge(lower, inside.long(), missing)
    tied = inside & (lower == low)
    return (upper > edge) | (inside & (lower > low)) | (tied & (tied.cumsum(0) <= missing))


def _edge(digits: Tensor, counted: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return the digit of the k-th highest of what is counted, and how many of that digit belong to the k."""
    counts = torch.zeros(1 << 16, dtype=torch.long, device=digits.device).scatter_add_(0, digits, counted)
    above = counts.flip(0).cumsum(0).flip(0) - counts  # of higher digits
    digit = (above < k).long().argmax()  # the lowest digit that fewer than k are above
    return digit, k - above[digit]


def memory_lines(size: Size, device: torch.device) -> list[str]:
    """Peak memory of a training step, masked over dense."""
    lines = []
    for name in size.models:
        peaks = {}
        for key in ("dense", "masked"):
            side = _trainings(name, size, device)[key]
            side.step()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            side.step()
            peaks[key] = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        if device.type == "cuda":
            lines.append(f"{name}: {peaks['masked'] / peaks['dense']:.3f} of {peaks['dense'] / 2**30:.2f} GiB")
    return lines or ["peak memory: measured on a GPU only"]
