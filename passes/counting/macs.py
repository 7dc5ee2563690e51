"""Multiply-accumulates of recorded operations, by fvcore's counters fed with static shapes.

One multiply-accumulate is 1 MAC; FLOPs = 2 * MACs. This is the only file that imports fvcore.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from passes.counting.recorder import Operation

with warnings.catch_warnings():  # fvcore's package imports torch.jit.script, which warns on new torch
    warnings.simplefilter("ignore", FutureWarning)
    from fvcore.nn import jit_handles as fvcore


@dataclass(frozen=True)
class Count:
    """What one operation costs.

    `macs` are those of convolutions and matrix products; `other` is fvcore's count for norms, pooling and resizing;
    both are None for an operation without a counter. `weights` names the parameters that a product multiplies by, or of
    which its weight is put together; a product of activations has none.
    """

    macs: int | None = None
    other: int | None = None
    weights: tuple[str, ...] = ()


class _Value:
    """What fvcore's counters read of a traced value: its shape, or its constant."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def isCompleteTensor(self) -> bool:  # noqa: N802 - the name is torch's
        return isinstance(self.value, torch.Size)

    def type(self) -> "_Value":
        return self

    def sizes(self) -> list[int]:
        return list(self.value)

    def toIValue(self) -> Any:  # noqa: N802
        return self.value


def _by_fvcore(
    handle: Callable[..., Any], arrange: Callable[[tuple[Any, ...]], Sequence[Any]] = tuple
) -> Callable[[Operation], int]:
    """Make a counter from one of fvcore's; `arrange` puts arguments where the handle expects them."""

    def count(operation: Operation) -> int:
        arguments = [_Value(a) for a in arrange(operation.args)]
        result = handle(arguments, [_Value(o) for o in operation.outputs])
        return int(sum(result.values()) if isinstance(result, dict) else result)

    return count


def _attention(operation: Operation) -> int:
    """Count softmax(Q K^T) V, which fvcore leaves out: L*S*(E + V) per head, with Q (.., L, E), K (.., S, E), V (.., S, V)."""
    query, key, value = operation.args[:3]
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _mv(operation: Operation) -> int:
    return math.prod(operation.args[0])


def _rows(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give a norm its input as a matrix: what it costs goes by the size, and fvcore takes two to five dimensions."""
    size = math.prod(args[0])
    return (torch.Size([1, size]), *args[1:])


def _grouped(operation: Operation) -> int:
    """Count rows (S, K) that are each multiplied by one matrix of a stack (E, K, N): S*K*N."""
    rows, stack = operation.args[:2]
    return math.prod(rows) * stack[-1]


_convolution = _by_fvcore(fvcore.conv_flop_jit, lambda args: (*args, *[None] * 12)[:12])
_matmul = _by_fvcore(fvcore.matmul_flop_jit)
_batch_norm_eval = _by_fvcore(fvcore.batchnorm_flop_jit, lambda args: (*args[:5], False))
_group_norm = _by_fvcore(fvcore.norm_flop_counter(1), _rows)
_pool = _by_fvcore(fvcore.elementwise_flop_counter(1, 0))

# {operation: (its counter, the positions of the operands that may be weights)}. The bias that addmm adds is not one.
_MACS: dict[str, tuple[Callable[[Operation], int], tuple[int, ...]]] = {
    "aten.convolution": (_convolution, (1,)),
    "aten.mm": (_matmul, (0, 1)),
    "aten.bmm": (_by_fvcore(fvcore.bmm_flop_jit), (0, 1)),
    "aten.addmm": (_by_fvcore(fvcore.addmm_flop_jit), (1, 2)),
    "aten.baddbmm": (_by_fvcore(fvcore.bmm_flop_jit, lambda args: args[1:3]), (1, 2)),
    "aten.mv": (_mv, (0, 1)),
    "aten.dot": (_mv, (0, 1)),
    "aten._grouped_mm": (_grouped, (0, 1)),
    "aten._trilinear": (lambda op: math.prod(op.args[0][:-1]) * math.prod(op.args[1]), (0, 1, 2)),
    "aten._scaled_dot_product_flash_attention": (_attention, ()),
    "aten._scaled_dot_product_flash_attention_for_cpu": (_attention, ()),
    "aten._scaled_dot_product_efficient_attention": (_attention, ()),
    "aten._scaled_dot_product_cudnn_attention": (_attention, ()),
    "aten._scaled_dot_product_fused_attention_overrideable": (_attention, ()),
}

_OTHER: dict[str, Callable[[Operation], int]] = {
    "aten.native_batch_norm": _batch_norm_eval,
    "aten._native_batch_norm_legit": _by_fvcore(fvcore.norm_flop_counter(1)),  # instance norm: batch statistics in eval
    "aten._native_batch_norm_legit_no_training": _batch_norm_eval,
    "aten.native_layer_norm": _by_fvcore(fvcore.norm_flop_counter(2), _rows),
    "aten.native_group_norm": _group_norm,
    "aten.mean": _pool,  # what adaptive average pooling to 1x1 runs
    "aten._adaptive_avg_pool2d": _pool,
    "aten._adaptive_avg_pool3d": _pool,
    "aten.upsample_nearest2d": _by_fvcore(fvcore.elementwise_flop_counter(0, 1)),
    "aten.upsample_bilinear2d": _by_fvcore(fvcore.elementwise_flop_counter(0, 4)),
    "aten.grid_sampler_2d": _by_fvcore(fvcore.elementwise_flop_counter(0, 4)),
}


def count(operation: Operation) -> Count:
    """Count one operation.

    Args:
        operation: as `passes.counting.run.record` recorded it.

    Returns:
        Its cost, empty where there is no counter.

    Example:
        >>> conv = Operation("aten.convolution", (torch.Size([1, 3, 8, 8]), torch.Size([16, 3, 3, 3]), None, [1, 1], [1, 1],
        ...     [1, 1], False, [0, 0], 1), (torch.Size([1, 16, 8, 8]),), (), "", "")
        >>> count(conv).macs == 8 * 8 * 16 * 3 * 3 * 3
        True
    """
    if operation.name in _MACS:
        counter, operands = _MACS[operation.name]
        named = [names for i in operands for names in operation.weights[i : i + 1] if names]
        return Count(macs=counter(operation), weights=named[-1] if named else ())
    if counter := _OTHER.get(operation.name):
        return Count(other=counter(operation))
    return Count()
