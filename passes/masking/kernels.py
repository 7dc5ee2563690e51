"""Kernels: which masked weights multiply with their kept values only in training.

Convolutions along one or two dimensions and linear layers, as layers of torch.nn and as nodes of graphs, may run sums over kept
weights (`passes.masking.products`) instead of torch's operations on the masked weight. Nothing that is saved depends on it.
"""

import copy
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.capture.captured import Captured, is_there
from passes.masking.mask import Mask, masks_of
from passes.masking.norms import join_norms_
from passes.masking.pools import call_pools_
from passes.masking.products import SIDES, may_run, sparse_product

KERNELS = ("auto", "masked", "sparse")
_FUNCTIONS = (F.linear, F.conv1d, F.conv2d)


def use_kernels(model: nn.Module, kernels: str) -> nn.Module:
    """Choose what the masked layers of a model run in training, in place.

    Args:
        model: a masked model.
        kernels: "masked": torch's operations on masked weights. "sparse": sums over kept weights, wherever there are some: for
            convolutions along one or two dimensions and linear layers, in float32 on the CPU, without autocast and torch.func.
            "auto": these where a model of costs says that they are faster than the masked weight, for the shapes at hand.

    Compressed parameters (`compress`) go on training with kept values only.

    Returns:
        The model.

    Raises:
        ValueError: `kernels` is none of these, or the model has no masks.

    Example:
        >>> import torch
        >>> from sparsify import sparsify
        >>> use_kernels(sparsify(nn.Linear(512, 512), 0.05), "auto")(torch.randn(64, 512)).shape
        torch.Size([64, 512])
    """
    if kernels not in KERNELS:
        raise ValueError(f"Unknown kernels {kernels!r}; known are {', '.join(KERNELS)}.")
    masks = masks_of(model)
    if not masks:
        raise ValueError("use_kernels takes a masked model, as sparsify() returns it.")
    for mask in masks.values():
        mask.kernels = "sparse" if mask.compressed else kernels
    return fuse_where_sparse(model)


def fuse_where_sparse(model: nn.Module) -> nn.Module:
    """Let the graphs of a model run sums over kept weights in training, where one of its masks wants them; others do not."""
    fuse = _in_training if any(mask.kernels != "masked" for mask in masks_of(model).values()) else None
    for module in model.modules():
        if isinstance(module, Captured):
            module.fuse_in_training(fuse)
    return model


def _in_training(graph: fx.Graph, module: nn.Module) -> fx.Graph:
    """Return a graph like another one that calls norms with what follows them, pools, and products with kept weights."""
    result = copy.deepcopy(graph)
    join_norms_(result, module)
    call_pools_(result, module)
    _join_products_(result, module)
    return result


def _join_products_(graph: fx.Graph, module: nn.Module) -> None:
    """Let a graph call products with the mask and the weight as it is, in place."""
    for node in [n for n in graph.nodes if n.op == "call_function" and n.target in _FUNCTIONS]:
        weight = node.kwargs.get("weight", node.args[1] if len(node.args) > 1 else None)
        if not isinstance(weight, fx.Node) or weight.op != "call_module" or weight.kwargs:
            continue
        if is_there(module, str(weight.target)) and isinstance(module.get_submodule(str(weight.target)), Mask):
            with graph.inserting_before(node):
                mask = graph.get_attr(str(weight.target))
                args, named = (mask, node.target.__name__, *node.args[:1]), {**node.kwargs, "weight": weight.args[0]}
                rest = dict(zip(("bias", *SIDES), node.args[2:], strict=False))
                node.replace_all_uses_with(graph.call_function(multiplied, args, named | rest))
            graph.erase_node(node)
            if not weight.users:
                graph.erase_node(weight)


def multiplied(mask: Mask, function: str, input: Tensor, weight: Tensor, bias: Tensor | None = None, **sides: Any) -> Tensor:
    """Return what a function of torch computes with a masked weight.

    Args:
        mask: of the weight.
        function: "linear", "conv1d" or "conv2d" of torch.nn.functional.
        input: what it multiplies.
        weight: the parameter.
        bias: of the outputs.
        **sides: the other arguments of a convolution.
    """
    given = () if function == "linear" else tuple((SIDES | sides).values())
    if may_run(mask) and (result := sparse_product(mask, input, weight, bias, given, function)) is not None:
        return result
    return getattr(F, function)(input, mask(weight), bias, **sides)
