"""Operation: what a node computes, as far as the kernels are concerned, and how layers and functions become one."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx


@dataclass(frozen=True)
class Operation:
    """A node as an operation; `kind` is one of `Op`'s, or "identity".

    Attributes:
        kind: what it is.
        inputs: the nodes that it reads.
        weight, bias: what it multiplies by and adds.
        activation: as in `Op`.
        options: as in `Op`.
        last: whether it takes channels last; None where it takes both.
    """

    kind: str
    inputs: tuple[fx.Node, ...]
    weight: Tensor | None = None
    bias: Tensor | None = None
    activation: tuple[str, float, float] = ("none", 0.0, 0.0)
    options: dict[str, Any] = field(default_factory=dict)
    last: bool | None = None


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Return the shape that a float32 tensor had when the graph last ran, None for anything else."""
    value = node.meta.get("tensor_meta")
    if getattr(value, "dtype", None) is not torch.float32:
        return None
    return tuple(value.shape)  # pyright: ignore[reportOptionalMemberAccess]


def binary(kind: str, node: fx.Node) -> Operation | None:
    """A sum or product of two values of one shape, or of an image and a gate: one number for every channel."""
    first, second = node.args
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or "get_attr" in (first.op, second.op):
        return None
    ours, theirs = shape_of(first) or (), shape_of(second) or ()
    if ours != theirs and kind == "multiply" and theirs == shape_of(node):
        first, second, ours, theirs = second, first, theirs, ours  # a gate comes second
    gate = len(ours) == 4 and theirs == (*ours[:2], 1, 1)
    return Operation(kind, (first, second), last=False if gate else None) if ours == theirs or gate else None


def normalized(norm: Any, inputs: tuple[fx.Node, ...]) -> Operation | None:
    """A norm by fixed statistics multiplies every channel by a number and adds one."""
    scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
    bias = (0 if norm.bias is None else norm.bias) - norm.running_mean * scale
    return scaled(inputs, scale.detach(), bias.detach())


def scaled(inputs: tuple[fx.Node, ...], scale: Tensor, bias: Tensor | None) -> Operation | None:
    """A number for every channel, times an image, is a depthwise convolution of one pixel."""
    rank = len(shape_of(inputs[0]) or ())
    if rank not in (3, 4):
        return None
    options = {"stride": [1] * (rank - 2), "padding": [0] * (rank - 2), "dilation": [1] * (rank - 2), "groups": len(scale)}
    return Operation("conv", inputs, scale.view(-1, *[1] * (rank - 1)), bias, options=options, last=False)


def product(
    inputs: tuple[fx.Node, ...], name: str, weight: Tensor, bias: Tensor | None, given: dict[str, Any]
) -> Operation | None:
    """A function that multiplies by a weight: linear, conv1d or conv2d."""
    if name == "linear":
        return Operation("linear", inputs, weight, bias, last=True)
    rank = weight.dim() - 2
    values = {key: given.get(key, usual) for key, usual in (("stride", 1), ("padding", 0), ("dilation", 1))}
    if any(isinstance(value, str) for value in values.values()):
        return None
    options = {key: [value] * rank if isinstance(value, int) else list(value) for key, value in values.items()}
    return Operation("conv", inputs, weight, bias, options={**options, "groups": given.get("groups", 1)}, last=False)


def permuted(inputs: tuple[fx.Node, ...], dims: tuple[int, ...]) -> Operation | None:
    """Channels that come first, or last, instead."""
    last: dict[tuple[int, ...], bool] = {(0, 2, 3, 1): False, (0, 3, 1, 2): True}
    return Operation("permute", inputs, options={"dims": list(dims)}, last=last[dims]) if dims in last else None


def average(inputs: tuple[fx.Node, ...], given: dict[str, Any]) -> Operation | None:
    """An average of a window is a depthwise convolution by one number."""
    kernel, shape = _pair(given["kernel_size"]), shape_of(inputs[0]) or ()
    padding = _pair(given.get("padding", 0))
    odd = given.get("ceil_mode") or given.get("divisor_override") or (any(padding) and not given.get("count_include_pad", True))
    if odd or len(shape) != 4:
        return None
    weight = torch.full((shape[1], 1, *kernel), 1 / (kernel[0] * kernel[1]))
    options = {"stride": _pair(given.get("stride") or kernel), "padding": padding, "dilation": [1, 1], "groups": shape[1]}
    return Operation("conv", inputs, weight, options=options, last=False)


def max_pool(inputs: tuple[fx.Node, ...], given: dict[str, Any]) -> Operation | None:
    """The largest pixel of each window of an image."""
    if len(shape_of(inputs[0]) or ()) != 4 or given.get("return_indices"):
        return None
    options = {"kernel_size": _pair(given["kernel_size"]), "stride": _pair(given.get("stride") or given["kernel_size"])}
    options |= {"padding": _pair(given.get("padding", 0)), "dilation": _pair(given.get("dilation", 1))}
    return Operation("max_pool", inputs, options={**options, "ceil_mode": bool(given.get("ceil_mode", False))}, last=False)


def adaptive(inputs: tuple[fx.Node, ...], size: Any) -> Operation | None:
    """An average to one pixel, or to the size that the image has."""
    size, shape = _pair(size), shape_of(inputs[0]) or ()
    if len(shape) != 4:
        return None
    if size == [1, 1]:
        return Operation("mean", inputs, options={"keepdim": True}, last=False)
    same = [None, *shape[2:]]
    if all(wanted in (None, have) for wanted, have in zip(size, same[1:], strict=True)):
        return Operation("adaptive_pool", inputs, options={"output_size": list(shape[2:])}, last=False)
    return None


def attention(parts: list[fx.Node], bias: fx.Node | None, heads: int, scale: float | None) -> Operation:
    """The arguments of `passes.lowering.attention.attend`."""
    features = (shape_of(parts[0]) or (0,))[-1] * len(parts) // 3
    options = {"heads": heads, "scale": (features / heads) ** -0.5 if scale is None else scale, "biased": bias is not None}
    return Operation("attention", (*parts, bias) if bias else (*parts,), options=options, last=True)


def padding_of(layer: Any) -> list[int] | None:
    """Return how many zeros are put at each side, None where sides differ."""
    if isinstance(layer.padding, str):
        around = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        if layer.padding == "valid":
            return [0] * len(around)
        return [a // 2 for a in around] if all(a % 2 == 0 for a in around) else None
    return list(layer.padding)


def _pair(value: Any) -> list[Any]:
    return [value, value] if isinstance(value, int) or value is None else list(value)


def dims_of(value: Any) -> tuple[int, ...]:
    """Return dimensions that are given as a list or one by one, () where they are not numbers."""
    flat = value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value
    return tuple(flat) if isinstance(flat, (tuple, list)) and all(isinstance(d, int) for d in flat) else ()


def gelu(approximate: str) -> str:
    """Return the name of the activation."""
    return "gelu" if approximate == "none" else "gelu_tanh"
