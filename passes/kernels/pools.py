"""Pools: max pooling in training as an operator of torch, which goes along rows in vectors where torch goes pixel by pixel."""

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from passes.kernels.compiler import native_for, threads
from passes.kernels.windows import Window

_LIBRARY = torch.library.Library("sparsify", "FRAGMENT")
_LIBRARY.define("max_pool(Tensor x, int[] kernel, int[] stride, int[] padding) -> (Tensor, Tensor)")
_LIBRARY.define(
    "max_pool_backward(Tensor grad, Tensor chosen, int[] sizes, int[] kernel, int[] stride, int[] padding) -> Tensor"
)
MOST = 256  # pixels of a window, whose numbers are bytes


class _MaxPool(ctypes.Structure):
    """The fields of `MaxPool` in native/max_pool.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("planes", "rows", "columns", "out_rows", "out_columns")),
        *((name, ctypes.c_int64 * 2) for name in ("kernel", "stride", "padding")),
    )


def _out(shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> list[int]:
    """Return the shape of what is pooled from a tensor of this shape."""
    window = Window((stride[0], stride[1]), (padding[0], padding[1]))
    return list(window.out(shape, (shape[1], 1, *kernel)))


def _max_pool(shape: Sequence[int], *sides: Sequence[int]) -> Any:
    pairs = [(ctypes.c_int64 * 2)(*side) for side in sides]
    return ctypes.byref(_MaxPool(math.prod(shape[:2]), *shape[2:], *_out(shape, *sides)[2:], *pairs))


@torch.library.impl(_LIBRARY, "max_pool", "CPU")
def _forward(x: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    y = x.new_empty(_out(x.shape, kernel, stride, padding))
    chosen = torch.empty(y.shape, dtype=torch.uint8)
    found = _max_pool(x.shape, kernel, stride, padding)
    native_for("max_pool").sparsify_max_pool_forward(found, x.data_ptr(), y.data_ptr(), chosen.data_ptr(), threads())
    return y, chosen


@torch.library.register_fake("sparsify::max_pool", lib=_LIBRARY)
def _fake(x: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> tuple[Tensor, Tensor]:
    y = x.new_empty(_out(x.shape, kernel, stride, padding))
    return y, y.new_empty(y.shape, dtype=torch.uint8)


@torch.library.impl(_LIBRARY, "max_pool_backward", "CPU")
def _backward(
    grad: Tensor, chosen: Tensor, sizes: list[int], kernel: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    grad, of_x = grad.contiguous(), grad.new_empty(sizes)
    pointers = (grad.data_ptr(), chosen.data_ptr(), of_x.data_ptr())
    native_for("max_pool").sparsify_max_pool_backward(_max_pool(sizes, kernel, stride, padding), *pointers, threads())
    return of_x


@torch.library.register_fake("sparsify::max_pool_backward", lib=_LIBRARY)
def _fake_backward(grad: Tensor, chosen: Tensor, sizes: list[int], *_: Any) -> Tensor:
    return grad.new_empty(sizes)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *ctx.sides = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1])


def _gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, chosen = ctx.saved_tensors
    if torch.is_grad_enabled():  # this gradient is to be differentiated itself
        x = x if x.requires_grad else x.detach().requires_grad_()
        return *torch.autograd.grad(F.max_pool2d(x, *ctx.sides), x, grad, create_graph=True), None, None, None
    return torch.ops.sparsify.max_pool_backward(grad, chosen, list(x.shape), *ctx.sides), None, None, None


torch.library.register_autograd("sparsify::max_pool", _gradients, setup_context=_remember, lib=_LIBRARY)


def max_pool(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Return the largest pixels of windows, as torch's max_pool2d does to the bit, with its gradient.

    Args:
        x: (images, channels, rows, columns) float32 on the CPU.
        kernel: rows and columns of a window, of at most `MOST` pixels.
        stride: from a window to the next.
        padding: around the pixels, at most half the window.
    """
    return torch.ops.sparsify.max_pool(x, list(kernel), list(stride), list(padding))[0]
