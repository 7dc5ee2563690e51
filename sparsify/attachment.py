"""Attachment: one optimizer, the masked weights it trains, and what an update does to both."""

import functools
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from passes.mask import Mask, masks_of, zero_dropped_
from sparsify import optimizers as opt
from sparsify.methods import Updates
from sparsify.topology import drop_and_grow


@dataclass(frozen=True)
class Bound:
    """A masked weight that an attached optimizer trains."""

    name: str
    weight: nn.Parameter
    mask: Mask


@dataclass
class Attachment:
    """One optimizer, the masked weights it trains, and how many steps it has taken.

    `corrected` are those that an ordinary step may move off 0: all of an optimizer that is not known to keep zeros, and
    those that Python code outside the graphs may read past their mask.
    """

    optimizer: Optimizer
    bound: list[Bound]
    corrected: list[Bound]
    step: int
    handles: list[Any]

    def set_dense_gradients(self, dense: bool) -> None:
        """Choose whether the next gradients of its weights are dense."""
        for b in self.bound:
            b.mask.dense_gradient = dense


def check_attach(
    model: nn.Module, updates: Updates | None, optimizers: tuple[Optimizer, ...], total_steps: int
) -> None:
    """Raise unless the optimizers can drive the updates of this model for so many steps."""
    if not isinstance(total_steps, int) or isinstance(total_steps, bool) or total_steps < 1:
        raise ValueError(f"total_steps={total_steps!r} must be a whole number of at least 1.")
    if strange := [o for o in optimizers if not isinstance(o, Optimizer)]:
        raise ValueError(f"attach() takes torch.optim optimizers, not {type(strange[0]).__name__}.")
    if len(set(optimizers)) < len(optimizers):
        raise ValueError("attach() was given the same optimizer twice.")
    if updates and updates.interval >= updates.end_fraction * total_steps:
        raise ValueError(
            f"No update would ever run: interval={updates.interval} is not below end_fraction * total_steps = "
            f"{updates.end_fraction * total_steps:g}. Lower the interval or train longer; method='static' never updates."
        )
    own = {p for optimizer in optimizers for p in opt.parameters(optimizer)}
    weights = {name: model.get_parameter(name) for name in masks_of(model)}
    if missing := [name for name, weight in weights.items() if weight.requires_grad and weight not in own]:
        raise ValueError(
            f"The optimizers do not hold {len(missing)} of {len(weights)} masked weights: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}. Make them from the sparsified model's parameters (after sparsify(), "
            f"which returns a copy), pass all of them to one attach(), or freeze the weight (requires_grad_(False))."
        )


def all_finite(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Tell on the device whether every gradient is free of NaN and inf, as a bool tensor of no dimension."""
    # Minimum and maximum propagate NaN, and read each gradient once.
    extremes = [extreme.to(device) for gradient in gradients for extreme in gradient.aminmax()]
    return torch.stack([extreme.isfinite() for extreme in extremes]).all()


def each_layer(changes: Iterable[functools.partial[None]]) -> None:
    """Run the changes of independent layers: one after the other on a device, side by side on the CPU, largest first."""
    ordered = sorted(changes, key=lambda change: -change.args[1].numel())
    if all(change.args[1].device.type == "cpu" for change in ordered):
        list(_workers(os.getpid()).map(lambda change: change(), ordered))
    else:
        for change in ordered:
            change()


@functools.cache
def _workers(process: int) -> ThreadPoolExecutor:
    """The threads of this process, kept: starting them anew costs as much as an update. A fork gets its own."""
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="sparsify-update")


@torch.no_grad()
def change(bound: Bound, gradient: Tensor, k: int, finite: Tensor, updates: Updates, optimizer: Optimizer) -> None:
    """Update one mask, and zero the weight and the optimizer's state wherever it changed."""
    mask, weight = bound.mask, bound.weight
    new = drop_and_grow(weight, updates.keep_score, gradient, updates.growth_score, mask.mask, k)
    changed = mask.mask.logical_xor(new)
    changed.view(torch.uint8).mul_(finite.to(new.device))  # a broadcast `logical_and_` is 25 times slower on the CPU
    mask.mask.logical_xor_(changed)
    zero_dropped_(weight, mask.mask)
    unchanged = changed.logical_not_()
    for state in opt.state_tensors(optimizer, weight):
        zero_dropped_(state, unchanged)


@torch.no_grad()
def zero_all_dropped(bound: list[Bound]) -> None:
    """Set every dropped weight back to 0, after an optimizer that may have moved them."""
    for b in bound:
        zero_dropped_(b.weight, b.mask.mask)
