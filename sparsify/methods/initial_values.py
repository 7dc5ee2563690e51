"""Initial values of the weights that masks keep, and of newly grown ones (RigL paper, appendix on new connections)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from passes.masking.mask import masks_of
from passes.weights.sites import Site
from sparsify.density.random_masks import uniform_numbers
from sparsify.methods.scores import LayerState

_STEP = 0.01  # of the active weights' size: a step this small along the gradient lowers the loss


def random(layer: LayerState) -> Tensor:
    """Draw values uniformly, with the root mean square of the active weights; keyed by (seed, step, name)."""
    numbers = uniform_numbers(layer.weight.numel(), layer.seed, f"{layer.name} grown", layer.step)
    values = torch.from_numpy(numbers).view(layer.weight.shape).to(layer.weight.device)
    return (2 * values - 1) * 3**0.5 * _size(layer)  # the root mean square of a uniform number in (-1, 1) is 1 / sqrt(3)


def against_gradient(layer: LayerState) -> Tensor:
    """Take a small step against the gradient: the largest is 1% of the root mean square of the active weights."""
    assert layer.gradient is not None
    largest = layer.gradient.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return -layer.gradient / largest * _STEP * _size(layer)


def _size(layer: LayerState) -> Tensor:
    return layer.weight.float().norm() / layer.nonzeros**0.5  # dropped weights are 0


GROWTH_INITS: dict[str, Callable[[LayerState], Tensor] | None] = {"zeros": None, "random": random, "gradient": against_gradient}


# Of kept weights, when a model is made sparse.


def rescale_weights(model: nn.Module, sites: Sequence[Site]) -> None:
    """Rescale kept weights to the fan-in that their mask leaves."""
    masks = masks_of(model)
    for site in sites:
        if site.name in masks:
            rescale_to_fan_in(model.get_parameter(site.name), masks[site.name].mask, site.uses[0].out_dim)


@torch.no_grad()
def rescale_to_fan_in(weight: Tensor, mask: Tensor, out_dim: int | None) -> None:
    """Multiply kept weights by sqrt(dense fan-in / kept fan-in), in place, so that activations keep their scale.

    Dense initializations assume that every input is there; at low density the signal dies out otherwise (Evci et al.,
    "Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win", arXiv 2010.03533, section 3).

    Args:
        weight: floating point, any shape.
        mask: bool, the same shape.
        out_dim: the dimension that indexes outputs, each with its own fan-in; None takes the mean fan-in.

    Example:
        >>> weight = torch.ones(2, 4)
        >>> rescale_to_fan_in(weight, torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]]).bool(), out_dim=0)
        >>> weight[:, 0]
        tensor([2., 1.])
    """
    dims = [d for d in range(mask.dim()) if d != out_dim]
    kept = mask.sum(dim=dims, keepdim=True).clamp(min=1)  # (1, ..., outputs, ..., 1)
    dense = mask.numel() // kept.numel()
    weight.mul_((dense / kept).sqrt().to(weight.dtype))


INITS: dict[str, Callable[[nn.Module, Sequence[Site]], None] | None] = {"keep": None, "fan_in": rescale_weights}
