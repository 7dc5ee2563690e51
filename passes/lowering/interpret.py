"""Interpret: a program by torch's operations, where the native kernels cannot run it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from passes.lowering.attention import attend
from passes.lowering.program import Op, Program, Weight

_ACTIVATIONS = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "tanh": torch.tanh,
}


def interpret(program: Program, inputs: Sequence[Tensor], values: Tensor, bits: Tensor) -> list[Tensor]:
    """Run a program on any device, in the number format of its inputs, with gradients.

    Args:
        program: what to compute.
        inputs: its inputs.
        values: the kept values of all weights, and the biases: (count,) float32.
        bits: which elements of the sparse weights are kept, eight in a byte: (bytes,) uint8.
    """
    found = list(inputs)
    for op in program.ops:
        found.append(run_op(op, found, dense(op.weight, values, bits) if op.weight else None, values))
    return [found[i] for i in program.outputs]


def run_op(op: Op, found: Sequence[Tensor], weight: Tensor | None, values: Tensor) -> Tensor:
    """Run one operation.

    Args:
        op: of a program.
        found: the values of the program so far.
        weight: of the operation, with its zeros.
        values: the numbers of the program.
    """
    bias = None if op.weight is None or op.bias is None else values[op.bias : op.bias + op.weight.shape[0]]
    inputs = [found[i] for i in op.inputs]
    weight, bias = (None if t is None else t.to(inputs[0].dtype) for t in (weight, bias))
    return _activated(_run(op, inputs, weight, bias), op.activation)


def dense(weight: Weight, values: Tensor, bits: Tensor) -> Tensor:
    """Return a weight with its zeros."""
    count = math.prod(weight.shape)
    kept = values[weight.start : weight.start + weight.count]
    if weight.count == count:
        return kept.view(weight.shape)
    packed = bits[weight.bits : weight.bits + -(-count // 8)]
    places = torch.arange(7, -1, -1, device=bits.device, dtype=torch.uint8)
    mask = (packed[:, None] >> places & 1).flatten()[:count].bool()
    return torch.zeros(count, dtype=values.dtype, device=values.device).masked_scatter(mask, kept).view(weight.shape)


def _run(op: Op, inputs: list[Tensor], weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x, more, options = inputs[0], inputs[1:], op.options or {}
    match op.kind:
        case "conv":
            assert weight is not None
            result = (F.conv1d, F.conv2d)[weight.dim() - 3](x, weight, bias, **options)
            return result + more[0] if more else result
        case "linear":
            assert weight is not None
            result = F.linear(x, weight, bias)
            return result + more[0] if more else result
        case "activation":
            return x
        case "add":
            return x + more[0]
        case "multiply":
            return x * more[0]
        case "max_pool":
            return F.max_pool2d(x, **options)
        case "adaptive_pool":
            return F.adaptive_avg_pool2d(x, **options)
        case "mean":
            return x.mean(tuple(range(2, x.dim())), **options)
        case "channels":
            return torch.cat([inputs[i][:, start:stop] for i, start, stop in options["pieces"]], 1)
        case "flatten":
            return x.flatten(1)
        case "permute":
            return x.permute(options["dims"])
        case "layer_norm":
            assert op.weight
            return F.layer_norm(x, op.weight.shape, weight, bias, **options)
        case "attention":
            parts, bias = (inputs[:-1], inputs[-1]) if options["biased"] else (inputs, None)
            return attend(parts, bias, options["heads"], options["scale"])
    raise ValueError(f"unknown operation {op.kind!r}")


def _activated(x: Tensor, activation: tuple[str, float, float]) -> Any:
    name, low, high = activation
    if name == "none":
        return x
    if name == "clamp":
        return x.clamp(low, high)
    return F.gelu(x, approximate="tanh") if name == "gelu_tanh" else _ACTIVATIONS[name](x)
