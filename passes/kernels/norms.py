"""Norms: batch normalisation in training with the addition and the ReLU behind it, as one operator of torch.

Norm, addition and ReLU each read and write whole activations; together they read them once from memory, again from the cache,
and write once, and their gradients likewise. Where convolutions cost a tenth, that is most of what is left of a step.
"""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from passes.kernels.compiler import native_for, threads

_LIBRARY = torch.library.Library("sparsify", "FRAGMENT")
_LIBRARY.define(
    "normalize(Tensor x, Tensor weight, Tensor bias, Tensor? other, float eps, bool relu) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "normalize_backward(Tensor grad, Tensor x, Tensor? y, Tensor weight, Tensor bias, Tensor mean, Tensor variance, float eps, "
    "bool relu, bool of_other) -> (Tensor, Tensor, Tensor, Tensor)"
)


class _Norm(ctypes.Structure):
    """The fields of `Norm` in native/norms.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("images", "channels", "pixels", "relu")),
        ("epsilon", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
    )


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool) -> Any:
    pixels = x.numel() // (x.shape[0] * x.shape[1])
    return ctypes.byref(_Norm(x.shape[0], x.shape[1], pixels, relu, eps, weight.data_ptr(), bias.data_ptr()))


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


@torch.library.impl(_LIBRARY, "normalize", "CPU")
def _normalize(
    x: Tensor, weight: Tensor, bias: Tensor, other: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = (t.contiguous() for t in (x, weight, bias))
    other = None if other is None else other.contiguous()
    y, mean, variance = torch.empty_like(x), torch.empty_like(bias), torch.empty_like(bias)
    norm = _norm(x, weight, bias, eps, relu)
    native_for("normalize").sparsify_norm_forward(norm, *_pointers(x, other, y, mean, variance), threads())
    return y, mean, variance


@torch.library.register_fake("sparsify::normalize", lib=_LIBRARY)
def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])


@torch.library.impl(_LIBRARY, "normalize_backward", "CPU")
def _normalize_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    relu: bool,
    of_other: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad, x, weight, bias = (t.contiguous() for t in (grad, x, weight, bias))
    found = torch.empty_like(x), torch.empty_like(x) if of_other else None, torch.empty_like(weight), torch.empty_like(bias)
    norm = _norm(x, weight, bias, eps, relu)
    native_for("normalize").sparsify_norm_backward(norm, *_pointers(grad, x, y, mean, variance, *found), threads())
    of_x, added, of_weight, of_bias = found
    return of_x, of_weight, of_bias, x.new_empty(0) if added is None else added


@torch.library.register_fake("sparsify::normalize_backward", lib=_LIBRARY)
def _fake_backward(grad: Tensor, x: Tensor, y: Any, weight: Tensor, *rest: Any) -> Any:
    return x.new_empty(x.shape), torch.empty_like(weight), torch.empty_like(weight), x.new_empty(x.shape if rest[-1] else 0)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, other, ctx.eps, ctx.relu = inputs
    y, mean, variance = output
    ctx.mark_non_differentiable(mean, variance)
    # Without an addition, the input says what came through the ReLU.
    ctx.save_for_backward(x, weight, bias, other, y if ctx.relu and other is not None else None, mean, variance)


def _gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    x, weight, bias, other, y, mean, variance = ctx.saved_tensors
    if torch.is_grad_enabled():  # these gradients are to be differentiated themselves
        given = [t if t is None or t.requires_grad else t.detach().requires_grad_() for t in (x, weight, bias, other)]
        again = F.batch_norm(given[0], None, None, given[1], given[2], True, 0.0, ctx.eps)  # pyright: ignore
        again = again if given[3] is None else again + given[3]
        found = torch.autograd.grad(
            again.relu() if ctx.relu else again, [t for t in given if t is not None], grad, create_graph=True
        )
        return *found, *[None] * (6 - len(found))
    of_x, of_weight, of_bias, of_other = torch.ops.sparsify.normalize_backward(
        grad, x, y, weight, bias, mean, variance, ctx.eps, ctx.relu, other is not None
    )
    return of_x, of_weight, of_bias, None if other is None else of_other, None, None


torch.library.register_autograd("sparsify::normalize", _gradients, setup_context=_remember, lib=_LIBRARY)


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor, other: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a batch normalised over images and pixels, with what follows.

    Args:
        x: (images, channels, ...) float32 on the CPU.
        weight, bias: (channels,).
        other: what is added, of x's shape, or None.
        eps: what is added to the variance.
        relu: whether negative numbers become 0 at the end.

    Returns:
        The result, and the mean and the biased variance of every channel of x.
    """
    return torch.ops.sparsify.normalize(x, weight, bias, other, eps, relu)
