"""Small-Dense: the narrower dense network with as many parameters as a sparse one, the baseline of the papers."""

import copy
import math
from typing import Any

from torch import nn

from passes.channels.narrow import Narrowable, Narrowing
from passes.counting.inputs import forward_arguments
from passes.masking.mask import masks_of

_TRIALS = 12  # bisections, each a run of the graph on meta tensors
_STRETCH = 8  # a size grows by 1 / 8 of itself at most, to use what scaling all of them leaves of the budget
_CLOSE = 0.995  # of the budget
_TURNS = 4
_ENOUGH = 0.99  # of the budget, below which sizes get another turn


def small_dense(model: nn.Module, density: float, inputs: Any) -> nn.Module:
    """Return the network of the same architecture whose channels are scaled down to a share of the parameters.

    All sizes shrink by one factor, through residuals, groups and concatenations, and some a little less, where whole numbers
    of channels would leave much of the budget; inputs and outputs of the whole stay, and attention keeps its heads. Weights
    are those of the model, thinned out evenly and rescaled to their fan-in.

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
    args, kwargs = forward_arguments(model, inputs)
    if masks_of(model):
        raise ValueError("small_dense() takes a dense model; this one is sparse. Narrow the model it was made from.")
    if kwargs:
        raise ValueError("small_dense() takes positional inputs.")
    narrowable = Narrowable(model, copy.copy(args))
    budget = density * sum(p.numel() for p in model.parameters())
    low, high = 0.0, 1.0
    best = narrowable.narrowing(_scaled(narrowable, low).__getitem__)
    if best.count(model) > budget:
        raise ValueError(
            f"density={density!r} is too low: with one channel for each it takes, {type(model).__name__} still has "
            f"{best.count(model)} parameters, {best.count(model) / budget * density:.4f} of its own."
        )
    for i in range(_TRIALS):
        middle = (low + high) / 2 if i else density**0.5  # most parameters lie between two scaled sizes
        trial = narrowable.narrowing(_scaled(narrowable, middle).__getitem__)
        if trial.count(model) <= budget:
            low, best = middle, trial
            if best.count(model) >= _CLOSE * budget:
                break
        else:
            high = middle
    return narrowable.apply(_stretched(narrowable, _scaled(narrowable, low), best, budget))


def _scaled(narrowable: Narrowable, scale: float) -> dict[int, int]:
    """Scale every size, rounded to the multiple that its groups or heads need: {size: new size}."""
    return {size: max(1, math.floor(scale * size / multiple + 0.5)) * multiple for size, multiple in narrowable.sizes.items()}


def _stretched(narrowable: Narrowable, widths: dict[int, int], best: Narrowing, budget: float) -> Narrowing:
    """Let sizes grow one after the other, the largest first, while parameters are left of the budget, again if many are."""
    model, count = narrowable.model, best.count(narrowable.model)
    before = -1
    for turn in range(_TURNS):
        if count == before or (turn and count >= _ENOUGH * budget):
            break
        before = count
        for size in sorted(widths, reverse=True):
            step, width = narrowable.sizes[size], widths[size]
            if count >= _CLOSE * budget:
                break
            if width == size or (one := _try(narrowable, widths | {size: width + step})) is None:
                continue
            cost = max(1, one.count(model) - count)  # of one step; more of them cost a little more each
            fit = min(int(budget - count) // cost, max(1, width // step // _STRETCH), (size - width) // step)
            while fit:
                trial = one if fit == 1 else _try(narrowable, widths | {size: width + fit * step})
                if trial and trial.count(model) <= budget:
                    best, count, widths = trial, trial.count(model), widths | {size: width + fit * step}
                    break
                fit = fit * 9 // 10
    return best


def _try(narrowable: Narrowable, widths: dict[int, int]) -> Narrowing | None:
    """Narrow to some widths, unless sizes that belong together no longer fit."""
    try:
        return narrowable.narrowing(widths.__getitem__)
    except ValueError:
        return None
