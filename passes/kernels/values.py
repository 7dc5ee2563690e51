"""Values: the kept values of a weight alone, (kept, 1), in the order of `weight[mask]`.

Two dimensions, since optimizers are often told to treat what has one as a bias.
"""

from typing import Any

import torch
from torch import Tensor

from passes.kernels.pending import begin, pending_or_new

_LIBRARY = torch.library.Library("sparsify", "FRAGMENT")
_LIBRARY.define("whole(Tensor values, Tensor mask) -> Tensor")
_LIBRARY.define("whole_backward(Tensor grad, Tensor mask, Tensor values) -> Tensor")


def is_compressed(weight: Tensor, mask: Tensor) -> bool:
    """Whether a parameter holds the kept values of a mask alone."""
    return weight.shape != mask.shape


def expand(values: Tensor, mask: Tensor) -> Tensor:
    """Return the whole weight, 0 where nothing is kept; differentiable.

    Example:
        >>> expand(torch.tensor([[5.0]]), torch.tensor([[False, True]]))
        tensor([[0., 5.]])
    """
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def gather(weight: Tensor, mask: Tensor) -> Tensor:
    """Return the kept values of a weight.

    Example:
        >>> gather(torch.tensor([[4.0, 5.0]]), torch.tensor([[False, True]]))
        tensor([[5.]])
    """
    return weight[mask].unsqueeze(1)


def give_values(weight: Tensor, values: Tensor) -> None:
    """Let a parameter hold other values, of another number too.

    Graphs that are still there, of a loss that somebody keeps, hold on to the node that accumulates a parameter's gradient, and
    it goes on expecting the old shape. torch makes a new one where the number format changes, and so this changes it twice.
    Hooks on that node, not on the parameter, are left with the old one.
    """
    if weight.shape != values.shape:
        weight.data = torch.empty(0, dtype=torch.float64 if weight.dtype != torch.float64 else torch.float32)
    weight.data = values


def expand_in_step(values: Tensor, mask: Tensor) -> Tensor:
    """Expand, in the step whose dense gradient decides growth: the gradient of the whole weight is kept for the update."""
    return torch.ops.sparsify.whole(values, mask)


@torch.library.impl(_LIBRARY, "whole", "CPU")
def _whole(values: Tensor, mask: Tensor) -> Tensor:
    begin(mask, values.grad if values.is_leaf else None)
    return expand(values, mask)


@torch.library.register_fake("sparsify::whole", lib=_LIBRARY)
def _fake(values: Tensor, mask: Tensor) -> Tensor:
    return values.new_empty(mask.shape)


@torch.library.impl(_LIBRARY, "whole_backward", "CPU")
def _whole_backward(grad: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    pending_or_new(mask).add(grad.clone(), mask)
    return gather(grad, mask)


@torch.library.register_fake("sparsify::whole_backward", lib=_LIBRARY)
def _fake_backward(grad: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(values)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    values, mask = ctx.saved_tensors
    return torch.ops.sparsify.whole_backward(grad, mask, values), None


torch.library.register_autograd("sparsify::whole", _gradients, setup_context=_remember, lib=_LIBRARY)
