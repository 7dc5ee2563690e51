"""Growth initialization: the values that newly grown weights start from (RigL paper, appendix on new connections)."""

from collections.abc import Callable

import torch
from torch import Tensor

from sparsify.initialization import uniform_numbers
from sparsify.scores import LayerState

_STEP = 0.01  # of the active weights' size: a step this small along the gradient lowers the loss


def random(layer: LayerState) -> Tensor:
    """Draw values uniformly, with the root mean square of the active weights; keyed by (seed, step, name)."""
    numbers = uniform_numbers(layer.weight.numel(), layer.seed, f"{layer.name} grown", layer.step)
    values = torch.from_numpy(numbers).view(layer.weight.shape).to(layer.weight.device)
    return (
        (2 * values - 1) * 3**0.5 * _size(layer)
    )  # the root mean square of a uniform number in (-1, 1) is 1 / sqrt(3)


def against_gradient(layer: LayerState) -> Tensor:
    """Take a small step against the gradient: the largest is 1% of the root mean square of the active weights."""
    assert layer.gradient is not None
    largest = layer.gradient.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return -layer.gradient / largest * _STEP * _size(layer)


def _size(layer: LayerState) -> Tensor:
    return layer.weight.float().norm() / layer.nonzeros**0.5  # dropped weights are 0


GROWTH_INITS: dict[str, Callable[[LayerState], Tensor] | None] = {
    "zeros": None,
    "random": random,
    "gradient": against_gradient,
}
