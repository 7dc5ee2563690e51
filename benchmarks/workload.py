"""What both environments share: the training step that is timed, and how it is timed. Needs torch and torchvision only."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

DENSITY = 0.1
FOREVER = 1_000_000  # total steps of a schedule that must not end, nor decay, while it is timed
WARMUP = 2


def small_model() -> nn.Module:
    """The model of the resnet18 rows."""
    torch.manual_seed(0)
    return resnet18(num_classes=10)


def small_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """The batch of the resnet18 rows."""
    return batch(16, 32)


class Perceptron(nn.Module):
    """Three linear layers: what libraries without convolutions take."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(inputs, width), nn.Linear(width, width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (batch, 10)."""
        return self.head(self.second(self.first(x).relu()).relu())


def mlp(inputs: int, width: int) -> nn.Module:
    """The model of the MLP rows."""
    torch.manual_seed(0)
    return Perceptron(inputs, width)


def batch(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images and labels of 10 classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, size, size, generator=generator)
    return images, torch.randint(10, (count,), generator=generator)


def sgd(model: nn.Module) -> torch.optim.SGD:
    """SGD with momentum; slow, so that gradients stay ordinary numbers however often a step is repeated."""
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


@dataclass(frozen=True)
class Trainer:
    """A model, its optimizer and the one batch that it sees.

    `take_step` is what follows the backward pass.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    data: tuple[torch.Tensor, torch.Tensor]
    take_step: Callable[[], object]

    def gradients(self) -> None:
        """Zero the gradients, run forward and backward."""
        self.optimizer.zero_grad()
        images, labels = self.data
        F.cross_entropy(self.model(images), labels).backward()

    def step(self) -> None:
        """One whole training step."""
        self.gradients()
        self.take_step()


def dense_trainer(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> Trainer:
    """The dense side of a ratio."""
    optimizer = sgd(model)
    return Trainer(model, optimizer, data, optimizer.step)


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """Turn `call` into a case: a function that runs it once and returns the seconds it took."""

    def case() -> float:
        gc.collect()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return case


def timed_update(trainer: Trainer) -> Callable[[], float]:
    """The case that times what follows the backward pass of every second step, which has to be an update."""

    def case() -> float:
        trainer.step()
        trainer.gradients()
        return timed(trainer.take_step)()

    return case


def interleave(cases: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Run every case once a round, after a warm-up; {name: seconds of each round}.

    The order stays the same, so that no case ever follows itself and finds its own weights in the cache.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(WARMUP + repeats):
        for name, case in cases.items():
            elapsed = case()
            if i >= WARMUP:
                seconds[name].append(elapsed)
    return seconds


@dataclass(frozen=True)
class Ratio:
    """The median of the rounds' ratios with its quartiles, and the median milliseconds of both sides."""

    median: float
    lower: float
    upper: float
    ms: float
    base_ms: float


class Row(NamedTuple):
    """One line of the table of times."""

    name: str
    goal: str
    ratio: Ratio


def shown(figure: Ratio) -> str:
    """A ratio with its quartiles."""
    return f"{figure.median:.2f} ({figure.lower:.2f}-{figure.upper:.2f})"


def ratio(seconds: dict[str, list[float]], case: str, base: str) -> Ratio:
    """Compare two cases of one `interleave`, round by round."""
    ratios = [a / b for a, b in zip(seconds[case], seconds[base], strict=True)]
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, lower, upper, *(1000 * statistics.median(seconds[name]) for name in (case, base)))
