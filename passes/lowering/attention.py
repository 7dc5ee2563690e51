"""Attention: `nn.MultiheadAttention` as the linear layers and the products that it consists of, so that each is lowered."""

import operator

import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.lowering.operation import shape_of


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


def attend(projected: Tensor, heads: int, batch_first: bool) -> Tensor:
    """Return the attention of queries, keys and values that follow each other in the last dimension.

    Args:
        projected: (batch, tokens, 3 * features), or (tokens, batch, 3 * features) unless `batch_first`.
        heads: how many heads share the features.
        batch_first: which dimension comes first.

    Returns:
        (batch, tokens, features), or (tokens, batch, features).
    """
    projected = projected if batch_first else projected.transpose(0, 1)
    parts = projected.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (3, batch, heads, tokens, features)
    queries, keys, values = parts.unbind(0)
    joined = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
    return joined if batch_first else joined.transpose(0, 1)


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
            inner = graph.call_module(f"{path}.inner", (node.args[0],))
            joined = graph.call_function(attend, (inner, layer.num_heads, layer.batch_first))
            outer = graph.call_module(f"{path}.outer", (joined,))
        for user in list(node.users):
            user.replace_all_uses_with(outer)  # the weights have no users
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
