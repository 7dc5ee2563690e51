"""Constants: channels that hold one number at every place, and what layers make of them; float64 on the CPU."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def is_depthwise(module: Any) -> bool:
    """Whether a layer is a convolution that makes each output from the input of the same number."""
    return getattr(module, "groups", 1) == getattr(module, "in_channels", 0) == getattr(module, "out_channels", 0) > 1


def uses(module: Any) -> Tensor:
    """Return which inputs each output has a weight for: (outputs, inputs of a group), bool on the CPU."""
    weight = module.weight.detach().cpu()
    return weight.flatten(2).ne(0).any(2) if weight.dim() > 2 else weight != 0


def is_padded(module: Any) -> bool:
    """Whether a convolution or linear layer reads something else than its input at the border."""
    return not isinstance(module, nn.Linear) and module.padding not in (0, (0,) * len(module.kernel_size))


def sums(module: Any) -> Tensor:
    """Return what an input that is 1 at every place adds to each output: (outputs, inputs), float64 on the CPU."""
    weight = _double(module.weight)
    return weight if weight.dim() == 2 else weight.flatten(2).sum(2)


def _double(tensor: Any) -> Any:
    return 0.0 if tensor is None else tensor.detach().double().cpu()


def constants_of(module: Any, inputs: Tensor) -> Tensor:
    """Return the number that each output of a layer holds at every place; NaN where it varies."""
    if isinstance(module, _BatchNorm):
        if module.running_mean is None:
            return torch.full_like(inputs, torch.nan)
        scale = (_double(module.running_var) + module.eps).rsqrt() * (1.0 if module.weight is None else _double(module.weight))
        return (inputs - _double(module.running_mean)) * scale + _double(module.bias)
    foldable = ~inputs.isnan() & ((inputs == 0) | (not is_padded(module)))
    known = torch.where(foldable, inputs, 0.0)
    used = uses(module)
    if getattr(module, "groups", 1) == 1:
        varies, values = (used & ~foldable).any(1), sums(module) @ known
    elif is_depthwise(module):
        varies, values = used[:, 0] & ~foldable, sums(module)[:, 0] * known
    else:
        varies, values = used.any(1), torch.zeros(len(used), dtype=torch.float64)
    return torch.where(varies, torch.nan, values + _double(module.bias))
