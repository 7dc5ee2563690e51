"""Tasks: a network, its data and the recipe it is trained by."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import data
import networks
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torchvision.models import resnet50


@dataclass(frozen=True)
class Task:
    """What a run trains. `schedule` maps (step, total steps) to a factor of the learning rate."""

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[Path | None, bool, bool], data.Data]  # (root, quick, validation)
    inputs: Any  # of flop_report
    epochs: int
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    schedule: Callable[[int, int], float]
    metric: str = "accuracy"  # in percent; or "bits" per character
    interval: int = 100  # steps between updates
    smoothing: float = 0.0  # of labels
    clip: float | None = None  # norm of the gradient
    gmp: dict[str, float] = field(default_factory=lambda: {"begin_fraction": 0.0, "end_fraction": 0.75})

    def scheduler(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """Return the learning rate's schedule over a run."""
        return LambdaLR(optimizer, lambda step: self.schedule(step, total_steps))


def steps_down(factor: float, parts: Iterable[float], warmup: float, step: int, total: int) -> float:
    """Rise linearly over a share of training, then multiply by `factor` at each of `parts`."""
    rise = min(1.0, (step + 1) / max(1.0, warmup * total))
    return rise * factor ** sum(step >= part * total for part in parts)


def cosine(step: int, total: int) -> float:
    """Fall to 0 along half a cosine."""
    return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / total)).item())


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)
_TEXT = torch.zeros((1, 64), dtype=torch.long)

TASKS = {
    task.name: task
    for task in (
        Task(
            "digits",
            networks.digit_net,
            data.digits,
            (1, 1, 8, 8),
            epochs=30,
            optimizer=partial(SGD, nesterov=False, weight_decay=1e-4),
            schedule=cosine,
            interval=20,
        ),
        # A network whose steps take long enough to be timed: WRN-22-2 on enlarged digits.
        Task(
            "digits-wide",
            networks.WideResNet22,
            partial(data.digits, size=16),
            (1, 3, 16, 16),
            epochs=8,
            optimizer=partial(SGD, nesterov=False, weight_decay=1e-4),
            schedule=cosine,
            interval=20,
        ),
        # The study's language model: the paper's, smaller, on shorter windows.
        Task(
            "chars-small",
            partial(networks.CharGRU, 128, 64),
            partial(data.characters, batch=32, length=32, steps=600),
            _TEXT,
            epochs=1,
            optimizer=partial(torch.optim.Adam, lr=3e-3),
            schedule=cosine,
            metric="bits",
            interval=30,
            clip=10.0,
        ),
        # RigL paper, section 4.2: 200 000 steps of 32 windows of 512 characters, Adam at 7e-4, gradients clipped at 10.
        Task(
            "chars",
            networks.CharGRU,
            data.characters,
            _TEXT,
            epochs=200,
            optimizer=partial(torch.optim.Adam, lr=7e-4, weight_decay=5e-4),
            schedule=lambda step, total: 1.0,
            metric="bits",
            clip=10.0,
        ),
        # arXiv 2103.15767: batch 128 of 45 000 images, 250 epochs; steps of 30 000 and 20 000 out of 88 000.
        Task(
            "cifar10",
            networks.WideResNet22,
            data.cifar10,
            (1, 3, 32, 32),
            epochs=250,
            optimizer=partial(SGD, weight_decay=5e-4),
            schedule=partial(steps_down, 0.2, (30 / 88, 60 / 88), 0.0),
            gmp={"begin_fraction": 0.008, "end_fraction": 0.75},
        ),
        Task(
            "cifar100",
            networks.cifar_resnet50,
            data.cifar100,
            (1, 3, 32, 32),
            epochs=250,
            optimizer=partial(SGD, weight_decay=1e-4),
            schedule=partial(steps_down, 0.2, (20 / 88, 40 / 88, 60 / 88, 80 / 88), 0.02),
            smoothing=0.1,
            gmp={"begin_fraction": 0.008, "end_fraction": 0.75},
        ),
        # RigL paper, section 4.1: 32 000 steps of 4096 images; here as many epochs of batches of 256 at a 16th of the rate.
        Task(
            "imagenet",
            resnet50,
            data.imagenet,
            (1, 3, 224, 224),
            epochs=100,
            optimizer=partial(SGD, weight_decay=1e-4),
            schedule=partial(steps_down, 0.1, (0.3, 0.7, 0.9), 0.05),
            interval=1600,
            smoothing=0.1,
            gmp={"begin_fraction": 10 / 32, "end_fraction": 26 / 32},
        ),
    )
}
