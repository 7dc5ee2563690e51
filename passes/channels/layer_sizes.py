"""Layer sizes: what torch.nn's layers look like with fewer inputs and outputs."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

Width = Callable[[int], int]
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention, nn.RNNBase)  # whose weights multiply inputs
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def sizes_of(layer: nn.Module, triple: bool = False) -> list[tuple[int, int]]:
    """Return (outputs, number that they must be a multiple of) of a layer whose outputs may shrink.

    Args:
        layer: one of torch.nn's.
        triple: whether its outputs are queries, keys and values of its inputs, whose number they follow.
    """
    if isinstance(layer, nn.modules.conv._ConvNd):
        if layer.groups == 1:
            return [(layer.out_channels, 1)]
        if layer.groups == layer.in_channels:  # depthwise: outputs follow inputs
            return []
        multiple = layer.in_channels // layer.groups if _keeps_group_size(layer) else layer.groups
        return [(layer.in_channels, multiple), (layer.out_channels, multiple)]
    if isinstance(layer, nn.Linear):
        return [] if triple else [(layer.out_features, 1)]
    if isinstance(layer, nn.MultiheadAttention):
        return [(layer.embed_dim, layer.num_heads)]
    if isinstance(layer, nn.GroupNorm):
        return [(layer.num_channels, layer.num_groups)]
    if isinstance(layer, nn.Embedding):
        return [(layer.embedding_dim, 1)]
    return [(layer.hidden_size, 1)] if isinstance(layer, nn.RNNBase) else []


def _keeps_group_size(conv: nn.modules.conv._ConvNd) -> bool:
    """Whether a narrower convolution has fewer groups rather than smaller ones: what leaves more widths to choose from."""
    return conv.in_channels == conv.out_channels and conv.groups > 1 and conv.in_channels <= conv.groups**2


def narrowed_layer(layer: nn.Module, inputs: Sequence[int], width: Width, triple: bool = False) -> nn.Module:
    """Return a copy of a layer for inputs of a shape, its outputs narrowed.

    Args:
        layer: one of torch.nn's, on any device.
        inputs: shape of what it is called with.
        width: outputs of the layer -> outputs of the copy.
        triple: as for `sizes_of`.

    Returns:
        A layer with the first of its old weights evenly thinned out.

    Raises:
        TypeError: this kind of layer cannot be narrowed.
    """
    new = copy.deepcopy(layer)
    attributes = _new_attributes(layer, inputs, width, triple)
    for name, value in attributes.items():
        setattr(new, name, value)
    shapes = _shapes(new)
    for name, parameter in [*layer.named_parameters(), *layer.named_buffers()]:
        if name in shapes and tuple(parameter.shape) != shapes[name]:
            owner, _, attribute = name.rpartition(".")
            store = new.get_submodule(owner)
            table = store._parameters if attribute in store._parameters else store._buffers
            table[attribute] = narrowed_parameter(parameter, shapes[name], store)
    if isinstance(new, nn.MultiheadAttention):
        new.out_proj.in_features = new.out_proj.out_features = new.embed_dim
    if isinstance(new, nn.RNNBase):  # which keeps its weights in a list besides
        new._flat_weights = [getattr(new, name) for name in new._flat_weights_names]
    return new


def apply_sizes(layer: nn.Module, narrowed: nn.Module, by_original: dict[Any, Any]) -> None:
    """Give a layer the sizes of a narrowed copy of it, in place; remember what became of each tensor in `by_original`."""
    sizes = {name: tuple(t.shape) for name, t in [*narrowed.named_parameters(), *narrowed.named_buffers()]}
    for module, new in zip(layer.modules(), narrowed.modules(), strict=True):
        plain = {k: v for k, v in vars(new).items() if isinstance(v, (int, tuple)) and k != "training"}
        vars(module).update(plain)
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        owner, _, attribute = name.rpartition(".")
        module = layer.get_submodule(owner)
        table: Any = module._parameters if attribute in module._parameters else module._buffers
        if tensor not in by_original:
            by_original[tensor] = narrowed_parameter(tensor, sizes[name], module)
        table[attribute] = by_original[tensor]
    if isinstance(layer, nn.RNNBase):
        layer._flat_weights = [getattr(layer, name) for name in layer._flat_weights_names]


@torch.no_grad()
def narrowed_parameter(tensor: Any, shape: tuple[int, ...], owner: nn.Module) -> Any:
    """Take evenly spaced elements along every dimension; a layer's weight is scaled up to its smaller fan-in.

    Evenly, so that queries, keys and values, groups and gates keep their shares.
    """
    if tensor.is_meta:
        new = torch.empty(shape, dtype=tensor.dtype, device="meta")
        return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    new = tensor.detach()
    for dim, size in enumerate(shape):
        if size < new.shape[dim]:
            new = new.index_select(dim, torch.arange(size, device=new.device) * new.shape[dim] // size)
    if tensor.dim() > 1 and isinstance(owner, _LAYERS):
        inputs = 0 if getattr(owner, "transposed", False) else 1
        new = new * (tensor.shape[inputs] / new.shape[inputs]) ** 0.5
    return nn.Parameter(new.clone(), tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new.clone()


def _new_attributes(layer: nn.Module, inputs: Sequence[int], width: Width, triple: bool) -> dict[str, Any]:
    if isinstance(layer, nn.modules.conv._ConvNd):
        ins = inputs[1]
        if layer.groups == layer.in_channels and layer.groups > 1:
            return {"in_channels": ins, "groups": ins, "out_channels": ins * (layer.out_channels // layer.in_channels)}
        groups = ins * layer.groups // layer.in_channels if _keeps_group_size(layer) else layer.groups
        return {"in_channels": ins, "groups": groups, "out_channels": width(layer.out_channels)}
    if isinstance(layer, nn.Linear):
        ins = inputs[-1]
        outs = 3 * ins if triple else width(layer.out_features)
        return {"in_features": ins, "out_features": outs}
    if isinstance(layer, nn.modules.batchnorm._NormBase):
        return {"num_features": inputs[1]}
    if isinstance(layer, nn.GroupNorm):
        return {"num_channels": inputs[1]}
    if isinstance(layer, nn.LayerNorm):
        return {"normalized_shape": tuple(inputs[-len(layer.normalized_shape) :])}
    if isinstance(layer, nn.MultiheadAttention) and layer.in_proj_weight is not None:
        size = inputs[-1]
        return {"embed_dim": size, "kdim": size, "vdim": size, "head_dim": size // layer.num_heads}
    if isinstance(layer, nn.Embedding):
        return {"embedding_dim": width(layer.embedding_dim)}
    if isinstance(layer, nn.RNNBase) and not layer.proj_size:
        return {"input_size": inputs[-1], "hidden_size": width(layer.hidden_size)}
    raise TypeError(f"there is no rule for a {type(layer).__name__}")


def _shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters and buffers of a layer by its attributes."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        ins, outs = layer.in_channels, layer.out_channels
        ends = (ins, outs // layer.groups) if layer.transposed else (outs, ins // layer.groups)
        return {"weight": (*ends, *layer.kernel_size), "bias": (outs,)}
    if isinstance(layer, nn.Linear):
        return {"weight": (layer.out_features, layer.in_features), "bias": (layer.out_features,)}
    if isinstance(layer, nn.MultiheadAttention):
        size = layer.embed_dim
        own = {"in_proj_weight": (3 * size, size), "in_proj_bias": (3 * size,)}
        return own | {"out_proj.weight": (size, size), "out_proj.bias": (size,)}
    if isinstance(layer, nn.Embedding):
        return {"weight": (layer.num_embeddings, layer.embedding_dim)}
    if isinstance(layer, nn.RNNBase):
        return {name: _recurrent_shape(layer, name) for name, _ in layer.named_parameters()}
    size = layer.normalized_shape if isinstance(layer, nn.LayerNorm) else (_features(layer),)
    return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), tuple(size))


def _features(norm: nn.Module) -> int:
    return norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features  # pyright: ignore


def _recurrent_shape(layer: nn.RNNBase, name: str) -> tuple[int, ...]:
    gates = {"LSTM": 4, "GRU": 3}.get(layer.mode, 1) * layer.hidden_size
    if name.startswith("bias"):
        return (gates,)
    if name.startswith("weight_hh"):
        return (gates, layer.hidden_size)
    first = "_l0" in name
    return gates, layer.input_size if first else layer.hidden_size * (2 if layer.bidirectional else 1)
