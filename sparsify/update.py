"""Update: one change of topology, of several layers and of what their optimizer keeps for them."""

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from passes.mask import Mask, zero_dropped_
from passes.shards import is_sharded, local, own_part, whole
from sparsify import optimizers as opt
from sparsify.method import Method, Updates
from sparsify.scores import LayerState, evaluate

T = TypeVar("T")


@dataclass(frozen=True)
class Bound:
    """A masked weight that an attached optimizer trains."""

    name: str
    weight: nn.Parameter
    mask: Mask


@dataclass(frozen=True)
class Change:
    """What an update does to one weight."""

    bound: Bound
    state: LayerState
    drop: int
    grow: int


@torch.no_grad()
def update_layers(
    method: Method, layers: list[tuple[Bound, LayerState]], amount: float, optimizer: Optimizer, skipped: Tensor
) -> bool:
    """Change the masks of some layers, unless what decides is not finite.

    Args:
        method: whose plan, scores and layout decide.
        layers: the weights with what is to be seen of them.
        amount: what the plan is told.
        optimizer: whose state at dropped and newly grown positions becomes 0.
        skipped: counts the updates that did not happen, on the device; int64, no dimension.

    Returns:
        False if nothing happened and the update has to come again: where counts vary the host asks. Otherwise the device
        decides, and an update that was not finite is over.
    """
    updates = method.updates
    assert updates is not None
    if not layers:
        return True
    states = [state for _, state in layers]
    finite = _all_finite([tensor for state in states for tensor in _deciding(state)], skipped.device)
    skipped += ~finite
    host_knows = updates.counts_vary or finite.device.type == "cpu"  # where asking does not wait
    if host_knows and not bool(finite):
        return not updates.counts_vary
    plan = updates.plan(states, amount)
    if not updates.counts_vary and any(drop != grow for drop, grow in plan):
        raise ValueError(f"Method {method.name!r} changes a layer's count; its Updates need counts_vary=True.")
    changes = [Change(b, state, *counts) for (b, state), counts in zip(layers, plan, strict=True) if any(counts)]
    masks = _each_layer(functools.partial(_decide, method), changes)  # all of them before any weight changes
    _each_layer(functools.partial(_apply, method, optimizer, finite), changes, masks)
    return True


def observe(updates: Updates, bound: Bound, average: Tensor | None, optimizer: Optimizer) -> None:
    """Let a step's gradient into its moving average, and let the optimizer see the kept weights' part of it only."""
    gradient = opt.dense_gradient(optimizer, bound.weight)
    if gradient is None:
        return
    if average is not None and updates.momentum is not None:
        gradient = whole(gradient)
        average.lerp_(torch.where(gradient.isfinite().all(), gradient, average), 1 - updates.momentum)
    if updates.dense_gradients == "always" and bound.weight.grad is not None:
        zero_dropped_(bound.weight.grad, bound.mask.mask)


def _deciding(state: LayerState) -> list[Tensor]:
    """Return what shows that something is not finite: the gradient, which weights that are not make so too, or the others."""
    if state.gradient is not None:
        return [state.gradient]
    return [t for t in (state.momentum, state.weight) if t is not None]


def _all_finite(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Tell on the device whether all is free of NaN and inf, as a bool tensor of no dimension."""
    # Minimum and maximum propagate NaN, and read each tensor once.
    extremes = [extreme.to(device) for tensor in tensors for extreme in tensor.aminmax()]
    return torch.stack([extreme.isfinite() for extreme in extremes]).all()


def _each_layer(function: Callable[..., T], changes: Sequence[Change], *more: Sequence[Any]) -> list[T]:
    """Run a function of independent layers: side by side on the CPU, largest first; one after the other where they wait
    for a device or for other ranks.
    """
    calls = list(zip(changes, *more, strict=True))
    if not all(c.bound.mask.mask.device.type == "cpu" and not is_sharded(c.bound.weight) for c in changes):
        return [function(*call) for call in calls]
    pool, order = _workers(os.getpid()), sorted(range(len(calls)), key=lambda i: -changes[i].state.mask.numel())
    futures = {i: pool.submit(function, *calls[i]) for i in order}
    return [futures[i].result() for i in range(len(calls))]


@functools.cache
def _workers(process: int) -> ThreadPoolExecutor:
    """The threads of this process, kept: starting them anew costs as much as an update. A fork gets its own."""
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="sparsify-update")


@torch.no_grad()
def _decide(method: Method, change: Change) -> Tensor:
    """Return the mask that a layer is to have."""
    updates, state = method.updates, change.state
    assert updates is not None
    leaving = evaluate(updates.drop_score, state, state.mask)
    coming = evaluate(updates.growth_score, state, ~state.mask) if change.grow else None
    return method.layout.exchange(state, leaving, coming, change.drop, change.grow)


@torch.no_grad()
def _apply(method: Method, optimizer: Optimizer, finite: Tensor, change: Change, new: Tensor) -> None:
    """Update one mask; then weight and optimizer state wherever it changed."""
    updates, state, mask, weight = method.updates, change.state, change.bound.mask, change.bound.weight
    assert updates is not None
    changed = mask.mask.logical_xor(new)
    changed.view(torch.uint8).mul_(finite.to(new.device))  # a broadcast `logical_and_` is 25 times slower on the CPU
    grown = updates.growth_init(state).to(weight.dtype) if updates.growth_init and change.grow else None
    mask.mask.logical_xor_(changed)
    zero_dropped_(weight, mask.mask)
    if grown is not None:
        _fill(weight, grown, changed & mask.mask)
    mask.nonzeros = state.nonzeros + change.grow - change.drop if method.layout.exact else int(mask.mask.sum())
    unchanged = changed.logical_not_()
    for kept in opt.state_tensors(optimizer, weight):
        zero_dropped_(kept, unchanged)


def _fill(weight: Tensor, values: Tensor, where: Tensor) -> None:
    own = local(weight)
    own.copy_(torch.where(own_part(where, weight), own_part(values, weight), own))
