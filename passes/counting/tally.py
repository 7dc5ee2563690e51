"""Tally: the cost of one forward pass, by weight, by product of activations and by node."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from passes.counting.inputs import forward_arguments
from passes.counting.macs import count
from passes.counting.run import record
from passes.masking.mask import masks_of

_OPS = {"convolution": "conv", "addmm": "linear", "mm": "linear"}

# Operations that compute nothing: views, allocation, and copies of data.
_FREE = frozenset(
    """view _unsafe_view reshape t transpose permute expand select slice unsqueeze squeeze detach alias as_strided
    split split_with_sizes chunk unbind empty empty_like new_empty empty_strided clone copy_ _to_copy contiguous
    fill_ zeros ones new_zeros new_ones full arange cat stack constant_pad_nd roll lift_fresh as_strided_ zero_
    unfold _reshape_alias""".split()
)


@dataclass(frozen=True)
class Tally:
    """The multiply-accumulates of one forward pass in evaluation, dense, whatever masks there are.

    Attributes:
        weights: {parameter name: MACs} of the products that multiply by it.
        ops: {parameter name: operation} of these.
        products: {(module or node, operation): MACs} of the products of activations.
        nodes: {(path of the captured region, node name): MACs}.
        past_masks: the masked weights that a product read past their mask, each as "name in module".
        other: FLOPs of norms, pooling and resizing, as fvcore counts them.
        uncounted: {operation: how often it ran} of those without a counter.
        inputs: the shapes of the inputs.
        measured: whether the pass ran on the example data itself, because shapes depend on it.
    """

    weights: dict[str, int]
    ops: dict[str, str]
    products: dict[tuple[str, str], int]
    nodes: dict[tuple[str, str], int]
    past_masks: list[str]
    other: int
    uncounted: dict[str, int]
    inputs: tuple[tuple[int, ...], ...]
    measured: bool

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the whole pass."""
        return sum(self.weights.values()) + sum(self.products.values())


def tally(model: nn.Module, inputs: Any) -> Tally:
    """Count one forward pass of a model, without running it wherever shapes alone say what it computes.

    Args:
        model: any module, on any device; it is not changed.
        inputs: a tensor, a tuple of arguments, a dict of keyword arguments, a list of tensors that is one argument, or one
            input shape.

    Returns:
        What it costs.

    Raises:
        ValueError: the inputs do not fit the model; the message names the node.
        TypeError: `inputs` is something else.

    Example:
        >>> tally(nn.Linear(4, 8), (2, 4)).weights
        {'weight': 64}
    """
    args, kwargs = forward_arguments(model, inputs)
    run = record(model, args, kwargs)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    sizes |= {name: mask.mask.numel() for name, mask in masks_of(model).items()}  # of compressed ones, the whole
    ops: dict[str, str] = {}
    weights, products, nodes, uncounted = Counter[str](), Counter(), Counter(), Counter()
    past, other = [], 0
    for operation in run.operations:
        cost, op = count(operation), operation.name.removeprefix("aten.")
        nodes[operation.region, operation.node] += cost.macs or 0
        if cost.macs is None:
            other += cost.other or 0
            uncounted[op] += cost.other is None and op not in _FREE
        elif cost.weights:
            weights.update(_shares(cost.macs, cost.weights, sizes))
            ops |= dict.fromkeys(cost.weights, _OPS.get(op, op))
            past += [f"{name} in {operation.module or type(model).__name__}" for name in operation.unmasked]
        else:
            products[operation.module or operation.node or "forward", op] += cost.macs
    shapes = tuple(tuple(t.shape) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
    often = {op: n for op, n in uncounted.most_common() if n}
    return Tally(dict(weights), ops, dict(products), dict(nodes), past, other, often, shapes, run.measured)


def _shares(macs: int, weights: tuple[str, ...], sizes: dict[str, int]) -> dict[str, int]:
    """Divide the cost of a product among the parameters that its weight is put together of, by their sizes."""
    total, shares = sum(sizes[name] for name in weights), {}
    for name in weights[:-1]:
        shares[name] = macs * sizes[name] // total
    return shares | {weights[-1]: macs - sum(shares.values())}
