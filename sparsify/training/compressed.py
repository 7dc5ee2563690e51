"""Compressed: what updates and checkpoints see of parameters that hold their kept values only, as if they were whole."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from passes.kernels.pending import like_values, pending
from passes.kernels.values import expand, gather
from passes.shards import Deferred
from sparsify.methods.selection import select
from sparsify.training.change import Bound

_CHANGED = (
    "The gradient of {} was changed after the backward pass, by more than a factor. Its parameter is compressed: which weights "
    "grow goes by the gradient as the backward pass found it."
)


@dataclass(frozen=True)
class Largest:
    """Of the gradient of a weight, what belongs to kept weights, and the largest of the others, as many as are kept.

    Attributes:
        shape: of the weight.
        places: int32 or int64, in the flat weight.
        values: as many.
    """

    shape: torch.Size
    places: Tensor
    values: Tensor

    def tensors(self) -> list[Tensor]:
        """Return what is held."""
        return [self.places, self.values]

    def whole(self) -> Tensor:
        """Return a gradient that is 0 elsewhere."""
        flat = self.values.new_zeros(self.shape.numel())
        return flat.index_copy_(0, self.places.long(), self.values).view(self.shape)


def largest(gradient: Tensor, mask: Tensor) -> Largest:
    """Return what an update sees of a gradient that looks at its largest values; where it is not finite, that it is not."""
    if not gradient.isfinite().all():
        gradient = torch.full_like(gradient, torch.nan).where(mask, 0)
    kept = int(mask.sum())
    chosen = select(gradient, min(kept, mask.numel() - kept), ~mask).logical_or_(mask)
    places = chosen.flatten().nonzero().squeeze(1)
    return Largest(mask.shape, places.int() if mask.numel() < 2**31 else places, gradient.flatten()[places])


@dataclass(frozen=True)
class WholeWeight(Deferred):
    """The weight whose kept values a parameter holds."""

    bound: Bound

    def full_tensor(self) -> Tensor:
        """Return it, 0 where nothing is kept."""
        return expand(self.bound.weight.detach(), self.bound.mask.mask)


@dataclass(frozen=True)
class WholeGradient(Deferred):
    """The gradient of the weight whose kept values a parameter holds.

    Attributes:
        bound: the parameter with its mask.
        values: (kept, 1), the gradient as the optimizer sees it.
        mean: of all ranks.
    """

    bound: Bound
    values: Tensor
    mean: Callable[[Tensor], Tensor]

    def full_tensor(self) -> Tensor:
        """Return it, dropped positions included, scaled as the optimizer's is since the backward pass."""
        mask = self.bound.mask.mask
        found = pending(mask)
        if found is None:
            raise RuntimeError(
                f"{self.bound.name} has a gradient that no backward pass of this step made. Its parameter is compressed: an "
                f"update needs backward() after attach(), and gradients that are written by hand need decompress()."
            )
        gradient, same = like_values(self.mean(found.whole()), mask, self.values)
        if not same:
            warnings.warn(_CHANGED.format(self.bound.name), stacklevel=2)
        return gradient


def gather_state(optimizer: Optimizer, bound: Sequence[Bound]) -> None:
    """Take the kept values of what was loaded whole into an optimizer, no earlier than its masks are there."""
    for b in bound:
        mask = b.mask.mask
        for key, value in optimizer.state.get(b.weight, {}).items() if b.mask.compressed else ():
            if isinstance(value, Tensor) and value.shape == mask.shape:
                optimizer.state[b.weight][key] = gather(value, mask)


def with_whole_state(optimizer: Optimizer, bound: Sequence[Bound], state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's `state_dict` with whole tensors for what it keeps of compressed parameters."""
    masks = {b.weight: b.mask.mask for b in bound if b.mask.compressed}
    if not masks:
        return state_dict
    own = [p for group in optimizer.param_groups for p in group["params"]]
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    state = dict(state_dict["state"])
    for parameter, key in zip(own, keys, strict=True):
        if parameter in masks and key in state:
            state[key] = {k: _whole(v, parameter, masks[parameter]) for k, v in state[key].items()}
    return {**state_dict, "state": state}


def _whole(value: Any, parameter: Tensor, mask: Tensor) -> Any:
    return expand(value, mask) if isinstance(value, Tensor) and value.shape == parameter.shape else value
