"""Change: one change of topology, of several layers and of what their optimizer keeps for them."""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from passes.masking.compressed import spread
from passes.masking.mask import Mask
from passes.masking.zeros import zero_dropped_
from passes.shards import is_sharded, local, own_part, whole
from sparsify.methods.layouts import ELEMENTS
from sparsify.methods.method import Method, Updates
from sparsify.methods.scores import LayerState, evaluate
from sparsify.training import optimizers as opt


@dataclass(frozen=True)
class Bound:
    """A masked weight that an attached optimizer trains."""

    name: str
    weight: nn.Parameter
    mask: Mask

    @property
    def is_plain(self) -> bool:
        """Whether the weight is all here, in the memory of the CPU."""
        return self.mask.mask.is_cpu and not is_sharded(self.weight) and not self.mask.compressed

    def has_stray(self, gradient: Tensor) -> Tensor:
        """Whether a gradient is not 0 somewhere where the weight is dropped, on the device; NaN and inf say nothing."""
        own = local(gradient)
        strays = own[own.ne(0).gt(own_part(self.mask.mask, gradient))]  # none, as a rule
        return strays.isfinite().any()


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
        optimizer: whose state becomes 0 at dropped positions, and what a new parameter gets at newly grown ones.
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
    finite = _all_finite((tensor for state in states for tensor in _deciding(state)), skipped.device)
    skipped += ~finite
    host_knows = updates.counts_vary or finite.device.type == "cpu"  # where asking does not wait
    if host_knows and not bool(finite):
        return not updates.counts_vary
    plan = updates.plan(states, amount)
    if not updates.counts_vary and any(drop != grow for drop, grow in plan):
        raise ValueError(f"Method {method.name!r} changes a layer's count; its Updates need counts_vary=True.")
    changes = [Change(b, state, *counts) for (b, state), counts in zip(layers, plan, strict=True) if any(counts)]
    begins = opt.first_states(optimizer) if any(change.grow for change in changes) else {}
    for change, mask in zip(changes, _decide_all(method, changes), strict=True):
        _apply(method, optimizer, begins.get(change.bound.weight, {}), finite, change, mask)
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


def _deciding(state: LayerState) -> Iterator[Tensor]:
    """Yield what has to be finite: the gradient, since weights that are not make it so too, or momentum and weight.

    One after the other: what is sharded is gathered for it.
    """
    tensors = (state.gradient,) if state.gradient is not None else (state.momentum, state.weight)
    yield from (whole(tensor) for tensor in tensors if tensor is not None)


def _all_finite(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Tell on the device whether all is free of NaN and inf, as a bool tensor of no dimension."""
    # Minimum and maximum propagate NaN, and read each tensor once.
    extremes = [extreme.to(device) for tensor in tensors for extreme in tensor.aminmax()]
    return torch.stack([extreme.isfinite() for extreme in extremes]).all()


def _decide_all(method: Method, changes: Sequence[Change]) -> list[Tensor]:
    """Return the masks that layers are to have, before any of them changes.

    Scores, which may be anybody's functions and draw random numbers, are evaluated here, largest layer first. On the CPU numpy
    selects side by side meanwhile; torch has threads of its own, and waits for devices and for other ranks.
    """
    order = sorted(range(len(changes)), key=lambda i: -changes[i].state.mask.numel())
    aside = method.layout is ELEMENTS and all(c.bound.is_plain for c in changes)
    run = _workers(os.getpid()).submit if aside else _at_once
    found = {i: run(method.layout.exchange, *_scores(method, changes[i])) for i in order}
    return [found[i].result() for i in range(len(changes))]


def _at_once(function: Callable[..., Tensor], *args: Any) -> Future[Tensor]:
    future = Future()
    future.set_result(function(*args))
    return future


@functools.cache
def _workers(process: int) -> ThreadPoolExecutor:
    """The threads of this process, kept: starting them anew costs as much as an update. A fork gets its own."""
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="sparsify-update")


@torch.no_grad()
def _scores(method: Method, change: Change) -> tuple[LayerState, Tensor, Tensor | None, int, int]:
    updates, state = method.updates, change.state
    assert updates is not None
    leaving = evaluate(updates.drop_score, state)
    coming = evaluate(updates.growth_score, state, growing=True) if change.grow else None
    return state, leaving.detach(), None if coming is None else coming.detach(), change.drop, change.grow


@torch.no_grad()
def _apply(
    method: Method, optimizer: Optimizer, begins: Mapping[str, float], finite: Tensor, change: Change, new: Tensor
) -> None:
    """Update one mask; then weight and optimizer state wherever it changed: new weights begin as they do in the optimizer."""
    updates, state, mask, weight = method.updates, change.state, change.bound.mask, change.bound.weight
    assert updates is not None
    changed = mask.mask.logical_xor(new)
    changed.view(torch.uint8).mul_(finite.to(new.device))  # a broadcast `logical_and_` is 25 times slower on the CPU
    grown = updates.growth_init(state.gathered()).to(weight.dtype) if updates.growth_init and change.grow else None
    kept, before = list(opt.state_tensors(optimizer, weight)), mask.mask.clone() if mask.compressed else mask.mask
    mask.mask.logical_xor_(changed)
    mask.nonzeros = state.nonzeros + change.grow - change.drop if method.layout.exact else int(mask.mask.sum())
    with spread(weight, before, mask) as whole_weight:
        zero_dropped_(whole_weight, mask.mask)
        if grown is not None:
            _fill(whole_weight, grown, changed & mask.mask)
    unchanged = changed.logical_not_()
    for key, tensor in kept:
        with spread(tensor, before, mask) as whole_tensor:
            zero_dropped_(whole_tensor, unchanged)
            if key in begins:
                local(whole_tensor).masked_fill_(own_part(~unchanged & mask.mask, whole_tensor), begins[key])
    if mask.compressed:
        mask.settle_places()
        opt.forget_gradient(optimizer, weight)  # of the values that were there


def _fill(weight: Tensor, values: Tensor, where: Tensor) -> None:
    own = local(weight)
    own.copy_(torch.where(own_part(where, weight), own_part(values, weight), own))
