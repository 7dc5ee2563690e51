"""Products: a layer and its gradients with kept weights only, as operators of torch.

`sparsify::convolve` computes what `torch.nn.functional.conv2d` does with the masked weight, and its gradients are those of the
masked path: 0 for dropped weights, except in the step whose dense gradient decides growth, where torch computes that of the
weight, and that alone. A linear layer is a convolution of an image one pixel high, whose channels lie innermost.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from passes.kernels.cache import as_images, format_of, prepared
from passes.kernels.compiler import native
from passes.kernels.pending import begin, count_pass, pending_or_new
from passes.kernels.values import expand, gather, is_compressed
from passes.kernels.windows import Window, with_pixels

_LIBRARY = torch.library.Library("sparsify", "FRAGMENT")
_WINDOW = "int[] stride, int[] padding, int[] dilation, int groups"
_LIBRARY.define(f"convolve(Tensor x, Tensor weight, Tensor? bias, Tensor mask, {_WINDOW}, bool dense_gradient) -> Tensor")
_LIBRARY.define(
    f"convolve_backward(Tensor grad, Tensor x, Tensor weight, Tensor mask, {_WINDOW}, bool dense_gradient, bool[] wanted) "
    "-> (Tensor, Tensor)"
)


def _dense(weight: Tensor) -> Tensor:
    """Return a weight without gaps, outputs first."""
    four = as_images(weight)
    return weight if four.is_contiguous() or four.is_contiguous(memory_format=torch.channels_last) else weight.contiguous()


def _window(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Window:
    return Window((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]), groups)


def _empty(x: Tensor, mask: Tensor, window: Window) -> Tensor:
    shape = window.out(x.shape, with_pixels(mask.shape))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=format_of(x))


@torch.library.impl(_LIBRARY, "convolve", "CPU")
def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, *rest: Any) -> Tensor:
    numbers = rest[:4]
    window = _window(*numbers)
    _check(x, bias, mask, window)
    x = x.contiguous(memory_format=format_of(x))
    if rest[4] and is_compressed(weight, mask):
        begin(mask, weight.grad if weight.is_leaf else None)
    if (library := native()) is None:
        return F.conv2d(x, as_images(_masked(weight, mask)), bias, *numbers)
    y = _empty(x, mask, window)
    bias, weight = bias if bias is None else bias.contiguous(), _dense(weight)
    prepared("output", library, weight, mask, window, x, y).run(library, x, y, weight, bias)
    return y


def _check(x: Tensor, bias: Tensor | None, mask: Tensor, window: Window) -> None:
    """Raise where native code would read what is not there."""
    outputs, inputs = mask.shape[0], mask.shape[1] * window.groups
    if x.dim() != 4 or x.shape[1] != inputs or (bias is not None and bias.shape != (outputs,)):
        given = f"{tuple(x.shape)} and a bias of {None if bias is None else tuple(bias.shape)}"
        raise ValueError(f"sparsify::convolve takes inputs of {inputs} channels and a bias of {outputs} numbers, not {given}.")


@torch.library.register_fake("sparsify::convolve", lib=_LIBRARY)
def _fake(x: Tensor, weight: Tensor, bias: Any, mask: Any, *rest: Any) -> Tensor:
    return _empty(x, mask, _window(*rest[:4]))


def _masked(weight: Tensor, mask: Tensor) -> Tensor:
    return expand(weight, mask) if is_compressed(weight, mask) else torch.where(mask, weight, 0)


def _gradient_of_whole(grad: Tensor, x: Tensor, shape: Sequence[int], numbers: Sequence[Any]) -> Tensor:
    """Return the gradient of a dense weight, by torch."""
    four = with_pixels(shape)
    if _window(*numbers) == Window() and four[2:] == (1, 1) and format_of(x) == torch.channels_last:
        rows = [t.permute(0, 2, 3, 1).flatten(0, 2) for t in (grad, x)]  # torch takes half as long for a product of matrices
        return (rows[0].t() @ rows[1]).reshape(shape)
    return _by_torch(grad, x, x.new_empty(four), numbers, 1).reshape(shape)


def _by_torch(grad: Tensor, x: Tensor, weight: Tensor, numbers: Sequence[Any], which: int) -> Tensor:
    """Return a gradient of a convolution: 0, of its input, which depends on the weight, or 1, of its weight, which does not."""
    *sides, groups = numbers
    wanted = [which == 0, which == 1, False]
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *sides, False, [0, 0], groups, wanted)[which]


def _masked_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, numbers: Sequence[Any], dense_gradient: bool, wanted: Sequence[bool]
) -> tuple[Any, Any]:
    """Return the gradients by torch, of the masked weight."""
    of_x = _by_torch(grad, x, as_images(_masked(weight, mask)), numbers, 0) if wanted[0] else None
    of_weight = _gradient_of_whole(grad, x, mask.shape, numbers) if wanted[1] else None
    if of_weight is not None and is_compressed(weight, mask):
        of_weight = gather(of_weight, mask)
    elif of_weight is not None and not dense_gradient:
        of_weight = torch.where(mask, of_weight, 0)
    return of_x, of_weight


@torch.library.impl(_LIBRARY, "convolve_backward", "CPU")
def _convolve_backward(grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *numbers, dense_gradient, wanted = rest
    window = _window(*numbers)
    x = x.contiguous(memory_format=format_of(x))
    grad, weight = grad.contiguous(memory_format=format_of(x)), _dense(weight)
    library, of_x, of_weight = native(), x.new_empty(0), x.new_empty(0)
    compressed = wanted[1] and is_compressed(weight, mask)
    if compressed:
        count_pass(mask)
    if compressed and dense_gradient:
        product = functools.partial(_gradient_of_whole, grad, x, mask.shape, numbers)
        if wanted[0]:
            pending_or_new(mask).add_product(product, (x, grad), mask)
        else:  # what somebody fills anew for every batch
            pending_or_new(mask).add(product(), mask)
        dense_gradient = False
    sparse = (wanted[0] and library, wanted[1] and library and not dense_gradient)
    left = [bool(needed and not done) for needed, done in zip(wanted, sparse, strict=True)]
    if sparse[0] and library:
        of_x = torch.empty_like(x)
        prepared("input", library, weight, mask, window, x, grad).run(library, grad, of_x, weight, None)
    if sparse[1] and library:
        of_weight = torch.empty_like(weight)
        prepared("weight", library, weight, mask, window, x, grad).gradient(library, x, grad, of_weight)
    if any(left):
        found = _masked_gradients(grad, x, weight, mask, numbers, dense_gradient, left)
        of_x, of_weight = found[0] if left[0] else of_x, found[1] if left[1] else of_weight
    return of_x, of_weight


@torch.library.register_fake("sparsify::convolve_backward", lib=_LIBRARY)
def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wanted = rest[-1]
    like = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=format_of(x))
    return like if wanted[0] else x.new_empty(0), torch.empty_like(weight) if wanted[1] else weight.new_empty(0)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, mask, *ctx.window, ctx.dense_gradient = inputs
    ctx.save_for_backward(x, weight, mask)
    ctx.has_bias = bias is not None


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, mask = ctx.saved_tensors
    needs = ctx.needs_input_grad
    of_bias = grad.sum((0, 2, 3)) if ctx.has_bias and needs[2] else None
    if torch.is_grad_enabled():  # these gradients are to be differentiated themselves
        of_x, of_weight = _masked_gradients(grad, x, weight, mask, ctx.window, ctx.dense_gradient, needs[:2])
    else:
        of_x, of_weight = torch.ops.sparsify.convolve_backward(
            grad, x, weight, mask, *ctx.window, ctx.dense_gradient, needs[:2]
        )
    return of_x if needs[0] else None, of_weight if needs[1] else None, of_bias, *[None] * 6


torch.library.register_autograd("sparsify::convolve", _gradients, setup_context=_remember, lib=_LIBRARY)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, window: Window, dense_gradient: bool) -> Tensor:
    """Return a convolution with the kept weights of a mask.

    Args:
        x: (images, inputs, rows, columns) float32 on the CPU, contiguous or channels last.
        weight: (outputs, inputs / groups, kernel rows, kernel columns), where what the mask drops counts as 0; or the values
            that it keeps, (kept, 1).
        bias: (outputs,), or None.
        mask: bool, of the whole weight's shape.
        window: what it looks at.
        dense_gradient: whether the gradient of the weight is that of all its elements.

    Returns:
        (images, outputs, rows, columns), lying as x does.
    """
    numbers = (window.stride, window.padding, window.dilation, window.groups)
    return torch.ops.sparsify.convolve(x, weight, bias, mask, *numbers, dense_gradient)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, dense_gradient: bool) -> Tensor:
    """Return a linear layer with the kept weights of a mask.

    Args:
        x: (..., inputs) float32 on the CPU.
        weight: (outputs, inputs), where what the mask drops counts as 0; or the values that it keeps, (kept, 1).
        bias: (outputs,), or None.
        mask: bool, (outputs, inputs).
        dense_gradient: whether the gradient of the weight is that of all its elements.

    Returns:
        (..., outputs).
    """
    pixels = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    y = convolve(pixels, weight, bias, mask, Window(), dense_gradient)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], mask.shape[0])
