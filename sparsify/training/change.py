"""Change: one change of topology, of several layers and of what their optimizer keeps for them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from passes.masking.compressed import spread
from passes.masking.mask import Mask
from passes.masking.zeros import zero_dropped_
from passes.shards import local, own_part, whole
from sparsify.methods.method import Method, Updates
from sparsify.methods.scores import LayerState, evaluate
from sparsify.training import optimizers as opt


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
    masks = [_decide(method, change) for change in changes]  # all of them, before any layer changes
    for change, mask in zip(changes, masks, strict=True):
        _apply(method, optimizer, begins.get(change.bound.weight, {}), None if host_knows else finite, change, mask)
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


@torch.no_grad()
def _decide(method: Method, change: Change) -> Tensor:
    """Return the mask that a layer is to have. Scores may be anybody's functions, and draw random numbers."""
    updates, state = method.updates, change.state
    assert updates is not None
    leaving = evaluate(updates.drop_score, state)
    coming = evaluate(updates.growth_score, state, growing=True) if change.grow else None
    coming = None if coming is None else coming.detach()
    return method.layout.exchange(state, leaving.detach(), coming, change.drop, change.grow)


@torch.no_grad()
def _apply(
    method: Method, optimizer: Optimizer, begins: Mapping[str, float], finite: Tensor | None, change: Change, new: Tensor
) -> None:
    """Update one mask, if all is finite, which the host may know; then weight and optimizer state wherever it changed.

    New weights begin as they do in the optimizer.
    """
    updates, state, mask, weight = method.updates, change.state, change.bound.mask, change.bound.weight
    assert updates is not None
    changed = mask.mask.logical_xor(new)
    if finite is not None:
        changed.logical_and_(finite.to(new.device))
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
