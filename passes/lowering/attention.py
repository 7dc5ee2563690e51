"""Attention: `nn.MultiheadAttention`, or views around torch's product, as one function that the kernels know."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.lowering.operation import dims_of, shape_of
from passes.torch_ops import is_view, name_of

_GIVEN = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_IDLE = ("view", "reshape", "contiguous", "clone", "_unsafe_view")  # where the shape stays


class Projections(nn.Module):
    """The linear layers of an attention."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        """Share the weights of an attention."""
        super().__init__()
        self.inner = nn.Linear(attention.embed_dim, 3 * attention.embed_dim, attention.in_proj_bias is not None, "meta")
        assert attention.in_proj_weight is not None
        self.inner.weight, self.inner.bias = attention.in_proj_weight, attention.in_proj_bias  # pyright: ignore
        self.outer = nn.Linear(attention.embed_dim, attention.embed_dim, attention.out_proj.bias is not None, "meta")
        self.outer.weight, self.outer.bias = attention.out_proj.weight, attention.out_proj.bias


def attend(parts: Sequence[Tensor], bias: Tensor | None, heads: int, scale: float | None) -> Tensor:
    """Return the attention of queries, keys and values.

    Args:
        parts: the three, (batch, tokens, features) each, or one tensor that has them behind each other in the last dimension.
        bias: what is added to the products: (batch or 1, heads or 1, keys, queries or 1).
        heads: how many heads share the features.
        scale: what products are multiplied by; None for one over the root of a head's features.

    Returns:
        (batch, tokens, features).
    """
    parts = parts if len(parts) == 3 else parts[0].chunk(3, -1)
    queries, keys, values = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
    bias = None if bias is None else bias.transpose(-1, -2)
    return F.scaled_dot_product_attention(queries, keys, values, bias, scale=scale).transpose(1, 2).flatten(2)


def bias_of(mask: Tensor) -> Tensor:
    """Return a mask of `scaled_dot_product_attention`, in four dimensions, as a bias of `attend`."""
    bias = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else mask
    return bias.transpose(-1, -2).contiguous()


def split_attention_(module: nn.Module, graph: fx.Graph) -> bool:
    """Replace every self-attention without masks, whose weights nobody asks for, by its parts, in place.

    Args:
        module: the root of the graph, in evaluation mode; attentions that are split are taken off it.
        graph: what it runs.

    Returns:
        Whether there was one.
    """
    found = False
    for node in [n for n in graph.nodes if n.op == "call_module"]:
        path = str(node.target)
        layer = module.get_submodule(path)
        if not isinstance(layer, nn.MultiheadAttention) or not _is_plain(layer, node):
            continue
        module.set_submodule(path, Projections(layer))
        with graph.inserting_before(node):
            x = node.args[0] if layer.batch_first else graph.call_method("transpose", (node.args[0], 0, 1))
            inner = graph.call_module(f"{path}.inner", (x,))
            joined = _call(graph, attend, [inner], None, layer.num_heads, None)
            outer = graph.call_module(f"{path}.outer", (joined,))
            result = outer if layer.batch_first else graph.call_method("transpose", (outer, 0, 1))
        for user in list(node.users):
            user.replace_all_uses_with(result)  # the weights have no users
            graph.erase_node(user)
        graph.erase_node(node)
        found = True
    return found


def _is_plain(layer: nn.MultiheadAttention, node: fx.Node) -> bool:
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    same = given["query"] is given.get("key") is given.get("value")
    extra = given.get("key_padding_mask") is not None or given.get("attn_mask") is not None or given.get("is_causal")
    odd = layer.bias_k is not None or layer.add_zero_attn or layer.in_proj_weight is None or layer._forward_hooks
    alone = sum(n.op == "call_module" and n.target == node.target for n in node.graph.nodes) == 1
    first = all(u.target is operator.getitem and (u.args[1] == 0 or not u.users) for u in node.users)
    batched = isinstance(given["query"], fx.Node) and len(shape_of(given["query"]) or ()) == 3
    return bool(same and not extra and not odd and alone and first and batched and type(layer) is nn.MultiheadAttention)


def join_heads_(graph: fx.Graph) -> bool:
    """Replace views that make heads of (batch, tokens, features), torch's product of these, and views that join them again.

    Args:
        graph: on whose nodes shapes are known; it is changed.

    Returns:
        Whether there was one.
    """
    biases: dict[fx.Node, fx.Node] = {}
    found = False
    for node in [n for n in graph.nodes if name_of(n) == "scaled_dot_product_attention"]:
        given = {**dict(zip(_GIVEN, node.args, strict=False)), **node.kwargs}
        shape, mask = shape_of(node) or (), given.get("attn_mask")
        if len(shape) != 4:
            continue
        last, parts = _joined(node), _parts(given["query"], given["key"], given["value"], shape)
        if not last or not parts or given.get("is_causal") or given.get("dropout_p") or given.get("enable_gqa"):
            continue
        if isinstance(mask, fx.Node):
            if len(_shape(mask)) != 4 or _shape(mask)[3] != shape[2]:
                continue
            if mask not in biases:
                with graph.inserting_before(node):
                    biases[mask] = _call(graph, bias_of, mask)
        with graph.inserting_before(node):
            bias = biases[mask] if isinstance(mask, fx.Node) else None
            result = _call(graph, attend, parts, bias, shape[1], given.get("scale"))
        last.replace_all_uses_with(result)
        _erase(last)
        found = True
    return found


def _call(graph: fx.Graph, function: Callable[..., Tensor], *args: Any) -> fx.Node:
    node = graph.call_function(function, args)
    node.meta["is_wrapped"] = True  # generated code keeps the call when it is traced again
    return node


def _erase(node: fx.Node) -> None:
    """Erase a node that nothing reads, and the views and products that only it read."""
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for n in inputs:
        if not n.users and (is_view(n) or name_of(n) == "scaled_dot_product_attention"):
            _erase(n)


def _parts(query: fx.Node, key: fx.Node, value: fx.Node, shape: tuple[int, ...]) -> list[fx.Node] | None:
    """Return what (batch, tokens, features) heads of this shape, (batch, heads, tokens, features), were made of."""
    batch, heads, tokens, features = shape
    if batch == tokens > 1 or any(_shape(x) != shape for x in (query, key, value)):
        return None  # the first two dimensions could be exchanged
    together = [_piece(_idle(x), (batch, tokens, 3, heads, features)) for x in (query, key, value)]
    if [place for _, place in together] == [0, 1, 2] and len({base for base, _ in together}) == 1:
        return [base for base, _ in together[:1] if base]
    apart = [_viewed(_swapped(_idle(x), (0, 2, 1, 3)), (batch, tokens, heads, features)) for x in (query, key, value)]
    return [base for base in apart if base] if all(apart) else None


def _piece(node: fx.Node, shape: tuple[int, ...]) -> tuple[fx.Node | None, Any]:
    """Return (batch, tokens, 3 * features) and which third of it a node is, that was cut from it by views."""
    if node.target is not operator.getitem:
        return None, None
    whole: Any = node.args[0]
    unbound = name_of(whole) == "unbind" and (*whole.args[1:], *whole.kwargs.values()) in ((), (0,))
    return _viewed(_swapped(whole.args[0] if unbound else whole, (2, 0, 3, 1, 4)), shape), node.args[1]


def _viewed(node: fx.Node | None, shape: tuple[int, ...]) -> fx.Node | None:
    """Return (batch, tokens, features) that a node of this shape is a view of."""
    views = ("view", "reshape", "unflatten", "_unsafe_view")
    if node is None or name_of(node) not in views or _shape(node) != shape:
        return None
    base = node.all_input_nodes[0]
    return base if shape_of(base) == (*shape[:2], math.prod(shape[2:])) else None


def _swapped(node: fx.Node, dims: tuple[int, ...]) -> fx.Node | None:
    """Return what a node is a permutation of by these dimensions."""
    given, rank = node.args[1:], len(dims)
    if name_of(node) == "permute":
        found = dims_of(given)
    elif name_of(node) in ("transpose", "swapaxes") and len(given) == 2 and all(isinstance(d, int) for d in given):
        first, second = (int(d) % rank for d in given)  # pyright: ignore[reportArgumentType]
        found = tuple({first: second, second: first}.get(d, d) for d in range(rank))
    else:
        return None
    return node.all_input_nodes[0] if tuple(d % rank for d in found) == dims else None


def _joined(node: fx.Node) -> fx.Node | None:
    """Return the node that joins the heads of a product, (batch, tokens, features), if nothing else reads what is between."""
    batch, heads, tokens, features = _shape(node)
    swapped = False
    while len(node.users) == 1:
        (node,) = node.users
        if not swapped and _swapped(node, (0, 2, 1, 3)):
            swapped = True
        elif swapped and name_of(node) in ("view", "reshape", "flatten") and _shape(node) == (batch, tokens, heads * features):
            return node
        elif name_of(node) not in _IDLE or _shape(node) != _shape(node.all_input_nodes[0]):
            return None
    return None


def _idle(node: fx.Node) -> fx.Node:
    while name_of(node) in _IDLE and _shape(node) == _shape(node.all_input_nodes[0]):
        node = node.all_input_nodes[0]
    return node


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("tensor_meta")
    return () if value is None else tuple(value.shape)
