"""Operations: what a node of a graph is to a program, if the kernels know it."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from passes.lowering.attention import attend
from passes.lowering.operation import (
    Operation,
    adaptive,
    attention,
    average,
    binary,
    dims_of,
    gelu,
    max_pool,
    normalized,
    padding_of,
    permuted,
    product,
    scaled,
    shape_of,
)
from passes.torch_ops import name_of, writes_in_place

_ACTIVATION_LAYERS: dict[type[nn.Module], Callable[[Any], tuple[str, float, float]]] = {
    nn.ReLU: lambda m: ("relu", 0.0, 0.0),
    nn.ReLU6: lambda m: ("clamp", 0.0, 6.0),
    nn.Hardtanh: lambda m: ("clamp", float(m.min_val), float(m.max_val)),
    nn.Sigmoid: lambda m: ("sigmoid", 0.0, 0.0),
    nn.SiLU: lambda m: ("silu", 0.0, 0.0),
    nn.Hardsigmoid: lambda m: ("hardsigmoid", 0.0, 0.0),
    nn.Hardswish: lambda m: ("hardswish", 0.0, 0.0),
    nn.GELU: lambda m: ("gelu" if m.approximate == "none" else "gelu_tanh", 0.0, 0.0),
    nn.Tanh: lambda m: ("tanh", 0.0, 0.0),
}
_ACTIVATION_NAMES = {
    **{name: (name, 0.0, 0.0) for name in ("relu", "sigmoid", "silu", "hardsigmoid", "hardswish", "tanh")},
    "relu6": ("clamp", 0.0, 6.0),
}
_ARGUMENTS = {  # of functions and methods, in order
    "cat": ("tensors", "dim"),
    "linear": ("input", "weight", "bias"),
    **dict.fromkeys(("conv1d", "conv2d"), ("input", "weight", "bias", "stride", "padding", "dilation", "groups")),
    "flatten": ("input", "start_dim", "end_dim"),
    "mean": ("input", "dim", "keepdim"),
    "relu": ("input", "inplace"),
    "relu6": ("input", "inplace"),
    "dropout": ("input", "p", "training", "inplace"),
    "dropout2d": ("input", "p", "training", "inplace"),
    "stochastic_depth": ("input", "p", "mode", "training"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "max_pool2d": ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    "avg_pool2d": ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    "adaptive_avg_pool2d": ("input", "output_size"),
}
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout)


def operation_of(root: nn.Module, node: fx.Node) -> Operation | None:
    """Return what a node is to a program; None where the kernels do not know it.

    Args:
        root: of the graph, in evaluation mode.
        node: of a graph on whose nodes `shape_of` knows shapes.
    """
    tensors = [n for n in node.all_input_nodes if n.op != "get_attr"]
    if shape_of(node) is None or not tensors or any(shape_of(n) is None for n in tensors) or overwrites(root, node):
        return None
    if node.op == "call_module":
        found = _layer(root.get_submodule(str(node.target)), node)
    elif node.op in ("call_function", "call_method"):
        found = _function(root, node, name_of(node))
    else:
        return None
    return found if found and _fits(found, node) else None


def _fits(found: Operation, node: fx.Node) -> bool:
    """Whether the kernels take these shapes: (batch, channels, [rows, columns]), or channels last."""
    ranks = {len(shape_of(n) or ()) for n in (*found.inputs, node)}
    constants = [t for t in (found.weight, found.bias) if t is not None]
    if any(t.dtype is not torch.float32 or t.device.type != "cpu" for t in constants) or not ranks <= {2, 3, 4}:
        return False
    batched = found.inputs[:-1] if found.options.get("biased") else found.inputs
    return all((shape_of(n) or (0,))[0] == (shape_of(node) or (0,))[0] for n in batched)


def overwrites(root: nn.Module, node: fx.Node) -> bool:
    """Whether a node writes into a value that others read."""
    layer = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    return writes_in_place(node, layer) and any(len(n.users) > 1 for n in node.all_input_nodes)


def _layer(layer: Any, node: fx.Node) -> Operation | None:
    x = node.all_input_nodes[:1]
    if len(node.args) != 1 or node.kwargs or not x or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    inputs, kind = tuple(x), type(layer)
    if kind in _ACTIVATION_LAYERS:
        return Operation("activation", inputs, activation=_ACTIVATION_LAYERS[kind](layer))
    if kind in _IDENTITIES:
        return Operation("identity", inputs)
    if kind in (nn.Conv1d, nn.Conv2d) and layer.padding_mode == "zeros" and (padding := padding_of(layer)) is not None:
        options = {"stride": list(layer.stride), "padding": padding, "dilation": list(layer.dilation), "groups": layer.groups}
        return Operation("conv", inputs, layer.weight, layer.bias, options=options, last=False)
    if kind is nn.Linear:
        return Operation("linear", inputs, layer.weight, layer.bias, last=True)
    if isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None:
        return normalized(layer, inputs)
    if (
        isinstance(layer, nn.LayerNorm)
        and kind is nn.LayerNorm
        and layer.weight is not None
        and len(layer.normalized_shape) == 1
    ):
        return Operation("layer_norm", inputs, layer.weight, layer.bias, options={"eps": layer.eps}, last=True)
    if kind is nn.MaxPool2d:
        return max_pool(inputs, vars(layer))
    if kind is nn.AvgPool2d:
        return average(inputs, vars(layer))
    if kind is nn.AdaptiveAvgPool2d:
        return adaptive(inputs, layer.output_size)
    if kind is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1):
        return Operation("flatten", inputs, last=False)
    return None


def _function(root: nn.Module, node: fx.Node, name: str) -> Operation | None:
    given = _arguments(node, name)
    if node.target is attend:
        return attention(*node.args)  # pyright: ignore[reportArgumentType]
    x = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if name == "cat" and given.get("dim") == 1 and isinstance(given["tensors"], (tuple, list)):
        joined = tuple(given["tensors"])
        # Of three dimensions, the second may be tokens.
        images = len(shape_of(node) or ()) != 3 or any(_channels_first(root, n) for n in joined)
        return Operation("channels", joined, last=False) if images else None
    if name == "mul" and len(node.args) == 2 and any(n.op == "get_attr" for n in node.all_input_nodes):
        return _scale(root, node)
    if x is None or x.op == "get_attr":
        return None
    inputs, name = (x,), {"iadd": "add", "imul": "mul", "add_": "add", "mul_": "mul", "relu_": "relu"}.get(name, name)
    plain = not given.keys() - {"inplace"}
    if name in ("linear", "conv1d", "conv2d") and (weight := _value(root, given.get("weight"))) is not None:
        return product(inputs, name, weight, _value(root, given.get("bias")), given)
    if name in _ACTIVATION_NAMES and plain:
        return Operation("activation", inputs, activation=_ACTIVATION_NAMES[name])
    if name == "gelu":
        return Operation("activation", inputs, activation=(gelu(given.get("approximate", "none")), 0.0, 0.0))
    if name in ("dropout", "dropout2d", "stochastic_depth") and not given.get("training", True):
        return Operation("identity", inputs)
    if name == "contiguous" and not given:
        return Operation("identity", inputs)
    if name in ("add", "mul") and len(node.args) == 2 and not node.kwargs:
        return binary("add" if name == "add" else "multiply", node)
    if name == "flatten" and given.get("start_dim") == 1 and given.get("end_dim", -1) == -1:
        return Operation("flatten", inputs, last=False)
    if name == "mean" and dims_of(given.get("dim")) in ((2, 3), (-2, -1), (-1, -2)):
        return Operation("mean", inputs, options={"keepdim": bool(given.get("keepdim", False))}, last=False)
    if name == "permute":
        return permuted(inputs, dims_of(node.args[1] if len(node.args) == 2 else node.args[1:]))
    if name == "layer_norm" and len(given["normalized_shape"]) == 1:
        weight, bias = (_value(root, given.get(key)) for key in ("weight", "bias"))
        return (
            None
            if weight is None
            else Operation("layer_norm", inputs, weight, bias, options={"eps": given.get("eps", 1e-5)}, last=True)
        )
    if name == "max_pool2d" and not given.get("return_indices"):
        return max_pool(inputs, given)
    if name == "avg_pool2d":
        return average(inputs, given)
    return adaptive(inputs, given["output_size"]) if name == "adaptive_avg_pool2d" else None


def _channels_first(root: nn.Module, node: fx.Node) -> bool:
    """Whether what computes a value takes its second dimension to be channels."""
    while (operation := operation_of(root, node)) and operation.last is None:
        node = operation.inputs[0]
    return operation is not None and operation.last is False


def _value(root: nn.Module, node: Any) -> Any:
    """Return the tensor that a node of a graph reads from the module."""
    return operator.attrgetter(str(node.target))(root) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def _scale(root: nn.Module, node: fx.Node) -> Operation | None:
    """A parameter (channels, 1, 1) times an image."""
    inputs = tuple(n for n in node.all_input_nodes if n.op != "get_attr")
    factor = next(_value(root, n) for n in node.all_input_nodes if n.op == "get_attr")
    shape = (shape_of(inputs[0]) or ()) if len(inputs) == 1 else ()
    if len(shape) != 4 or tuple(factor.shape) not in ((shape[1], 1, 1), (1, shape[1], 1, 1)):
        return None
    return scaled(inputs, factor.detach().reshape(-1), None)


def _arguments(node: fx.Node, name: str) -> dict[str, Any]:
    """Return the arguments of a function or method by name, besides what it is applied to."""
    names = _ARGUMENTS.get(name, ("input",))
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return {key: value for key, value in given.items() if key != "input"}
