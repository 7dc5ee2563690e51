"""Scores: how much each weight of a layer matters, as pure functions of what an update can see.

A score is a function of a `LayerState` that returns a tensor of the weight's shape; weights rank by its absolute value.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from passes.shards import whole
from sparsify.density.random_masks import uniform_numbers


@dataclass(frozen=True)
class LayerState:
    """What an update sees of one masked weight.

    `gradient` and `momentum` are None unless the method asks for them; the gradient is dense, dropped positions included. A
    score gets everything whole: what FSDP shards is gathered for it, one layer at a time.
    """

    name: str
    weight: Tensor
    mask: Tensor  # bool, the same shape
    nonzeros: int  # True elements of the mask
    target: int  # how many of them the distribution gives it
    unit: int  # weights that are dropped or grown together
    out_dim: int | None  # the weight's dimension that indexes outputs, where it is known
    gradient: Tensor | None
    momentum: Tensor | None  # exponential moving average of the gradient
    step: int  # optimizer steps, counted from 1
    seed: int

    def gathered(self) -> "LayerState":
        """Return the same with what is spread over ranks in one piece. Every rank has to call it."""
        return replace(self, weight=whole(self.weight), gradient=whole(self.gradient), momentum=whole(self.momentum))


Score = Callable[[LayerState], Tensor]


def weight(layer: LayerState) -> Tensor:
    """Score by |w|."""
    return layer.weight


def gradient(layer: LayerState) -> Tensor:
    """Score by |dL/dw| (RigL, arXiv 1911.11134)."""
    assert layer.gradient is not None
    return layer.gradient


def momentum(layer: LayerState) -> Tensor:
    """Score by the moving average of the gradient (SNFS, arXiv 1907.04840)."""
    assert layer.momentum is not None
    return layer.momentum


def saliency(layer: LayerState) -> Tensor:
    """Score by |w * dL/dw|, the connection sensitivity of SNIP (arXiv 1810.02340, equation 4)."""
    return layer.weight * gradient(layer)


def chance(layer: LayerState) -> Tensor:
    """Score at random (SET, arXiv 1707.04780), keyed by (seed, step, name): equal on every rank, device and resume."""
    numbers = uniform_numbers(layer.weight.numel(), layer.seed, layer.name, layer.step)
    return torch.from_numpy(numbers).view(layer.weight.shape).to(layer.weight.device)


_NOTHING = " Gradients are there with dense_gradients='updates' or 'always', momentum where its decay is given."
_OWN = (weight, gradient, momentum)  # seen to be finite before an update


def evaluate(score: Score, layer: LayerState, growing: bool = False) -> Tensor:
    """Return a score of a layer, checked, since it may be a user's function.

    Args:
        score: the function.
        layer: what it sees.
        growing: whether the score decides among dropped weights instead of kept ones. NaN elsewhere counts as 0, and on a
            device that one would have to wait for it does everywhere.

    Raises:
        ValueError: it did not return real numbers in the weight's shape, or it returned NaN where it decides.
    """
    result = score(layer.gathered())
    if score in _OWN:
        return result
    name, shape = getattr(score, "__name__", score), tuple(layer.mask.shape)
    if not isinstance(result, Tensor) or tuple(result.shape) != shape or result.is_complex():
        found = f"{tuple(result.shape)} and {result.dtype}" if isinstance(result, Tensor) else repr(result)
        hint = _NOTHING if result is None else ""
        raise ValueError(f"The score {name} returned {found} for {layer.name}; it must be real numbers of shape {shape}.{hint}")
    result = result if result.is_floating_point() else result.float()
    if result.device.type == "cpu" and (result.isnan() & (layer.mask ^ growing)).any():
        raise ValueError(f"The score {name} returned NaN for {layer.name}, where it has to decide.")
    return result.nan_to_num(0.0, torch.inf, -torch.inf)
