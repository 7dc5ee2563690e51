"""Inputs: what users pass as `inputs`, as the arguments of a forward pass."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from passes.shards import refuse_shards


def forward_arguments(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn what users pass as `inputs` into the positional and the keyword arguments of forward."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"flop_report() takes a torch.nn.Module, not {type(model).__name__}.")
    refuse_shards(model)
    if isinstance(inputs, (tuple, list)) and inputs and all(isinstance(n, int) and n > 0 for n in inputs):
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        return (torch.empty(tuple(inputs), dtype=dtype, device="meta"),), {}
    if isinstance(inputs, (Tensor, tuple, list, dict)) and any(isinstance(t, Tensor) for t in pytree.tree_leaves(inputs)):
        if isinstance(inputs, dict):
            return (), inputs
        return (inputs if isinstance(inputs, tuple) else (inputs,)), {}
    raise TypeError(
        f"inputs={inputs!r} must be a tensor, a tuple of arguments, a dict of keyword arguments, a list of tensors that is "
        f"one argument, or one input shape such as (1, 3, 224, 224)."
    )


def forward_values(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn what users pass as `inputs` into arguments to run a model on.

    A shape stands for random numbers, of two samples at least: batch norm in training takes no fewer.
    """
    args, kwargs = forward_arguments(model, inputs)
    if isinstance(inputs, (tuple, list)) and all(isinstance(n, int) for n in inputs):
        generator = torch.Generator().manual_seed(0)
        device = next((p.device for p in model.parameters()), "cpu")
        shape = (max(2, inputs[0]), *inputs[1:])
        args = (torch.randn(shape, generator=generator).to(device, args[0].dtype),)
    return args, kwargs
