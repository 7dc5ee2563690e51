"""Small-Dense: the narrower dense network with as many parameters as a sparse one, the baseline of the papers."""

import copy
import math
from typing import Any

from torch import nn

from passes.mask import masks_of
from passes.narrow import Narrowable, Narrowing
from sparsify.flops import arguments_of

_TRIALS = 12  # bisections, each a walk over the graph on meta tensors
_CLOSE = 0.995  # of the budget


def small_dense(model: nn.Module, density: float, inputs: Any) -> nn.Module:
    """Return the network of the same architecture whose channels are scaled down to a share of the parameters.

    All sizes shrink by one factor, through residuals, groups and concatenations; inputs and outputs of the whole stay, and
    attention keeps its heads. Weights are those of the model, thinned out evenly and rescaled to their fan-in.

    Args:
        model: a dense module that fx traces whole, on any device.
        density: share of the parameters to have, in (0, 1].
        inputs: what `flop_report` takes; positional.

    Returns:
        An `fx.GraphModule` that is also an instance of the model's own class, of at most that many parameters and as near
        as whole numbers of channels allow.

    Raises:
        ValueError: the density is out of range or too low for the architecture, the model does not trace whole, or a node
            cannot follow; the message names it.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(10, 100), nn.ReLU(), nn.Linear(100, 10))
        >>> small = small_dense(model, 0.2, (1, 10))
        >>> small[0].weight.shape, sum(p.numel() for p in small.parameters())
        (torch.Size([19, 10]), 409)
    """
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise ValueError(f"density={density!r} must be a number in (0, 1].")
    args, kwargs = arguments_of(model, inputs)
    if masks_of(model):
        raise ValueError("small_dense() takes a dense model; this one is sparse. Narrow the model it was made from.")
    if kwargs:
        raise ValueError("small_dense() takes positional inputs.")
    narrowable = Narrowable(model, copy.copy(args))
    budget = density * sum(p.numel() for p in model.parameters())
    low, high = 0.0, 1.0
    best = _at(narrowable, low)
    if best.count(model) > budget:
        raise ValueError(
            f"density={density!r} is too low: with one channel for each it takes, {type(model).__name__} still has "
            f"{best.count(model)} parameters, {best.count(model) / budget * density:.4f} of its own."
        )
    for i in range(_TRIALS):
        middle = (low + high) / 2 if i else density**0.5  # most parameters lie between two scaled sizes
        trial = _at(narrowable, middle)
        if trial.count(model) <= budget:
            low, best = middle, trial
            if best.count(model) >= _CLOSE * budget:
                break
        else:
            high = middle
    return narrowable.apply(best)


def _at(narrowable: Narrowable, scale: float) -> Narrowing:
    """Scale every size, rounded to the multiple that its groups or heads need."""

    def width(size: int) -> int:
        multiple = narrowable.sizes[size]
        return max(1, math.floor(scale * size / multiple + 0.5)) * multiple

    return narrowable.narrowing(width)
