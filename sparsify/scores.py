"""Scores: how much each weight of a layer matters, as pure functions of what an update can see.

A score is a function of a `LayerState` that returns a tensor of the weight's shape; weights rank by its absolute value.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from passes.shards import whole
from sparsify.initialization import uniform_numbers


@dataclass(frozen=True)
class LayerState:
    """What an update sees of one masked weight.

    `gradient` and `momentum` are None unless the method asks for them; the gradient is dense, dropped positions included.
    All tensors are whole: what FSDP shards is gathered when it is read, so that one layer at a time is.
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

    def __getattribute__(self, name: str) -> Any:
        return whole(super().__getattribute__(name))


Score = Callable[[LayerState], Tensor]


def evaluate(score: Score, layer: LayerState) -> Tensor:
    """Return a score of a layer, checked, since it may be anybody's function.

    Raises:
        ValueError: it is no tensor of real numbers of the weight's shape, or has NaN, where asking does not wait for a device.
    """
    result, shape = score(layer), tuple(layer.mask.shape)
    if not isinstance(result, Tensor):
        problem = f"returned {result!r}"
    elif any(result is own for own in (layer.weight, layer.gradient, layer.momentum)):  # seen to be finite before
        return result
    elif tuple(result.shape) != shape or not result.is_floating_point():
        problem = f"returned a tensor of shape {tuple(result.shape)} and {result.dtype}"
    elif result.device.type == "cpu" and result.isnan().any():
        problem = "returned NaN"
    else:
        return result
    name = getattr(score, "__name__", score)
    raise ValueError(
        f"The score {name} {problem} for {layer.name}; it must return floating point numbers of shape {shape}."
    )


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
