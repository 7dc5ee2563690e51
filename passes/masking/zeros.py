"""Zeros: tensors, and gradients, that are 0 where a mask drops."""

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import (  # pyright: ignore[reportMissingImports]
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
)
from torch.autograd.graph import increment_version

from passes.kernels.compiler import native, threads
from passes.shards import is_sharded, local, own_part

_INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
_CHUNK = 1 << 20  # elements: the widened mask of one chunk takes 4 MB, and few chunks mean few waits for the threads


def zero_dropped_(tensor: Tensor, mask: Tensor) -> Tensor:
    """Set `tensor` to exactly 0 where `mask` is False, in place; NaN and inf there become 0 too.

    On the CPU the bits are multiplied as integers, chunk by chunk: near memory speed and without a copy of the tensor
    (`masked_fill_` takes several times as long there, and float * bool lets NaN through).

    Args:
        tensor: floating point, any shape; of a sharded one, the part of this rank is changed. It may be a sparse one, as
            embeddings have gradients.
        mask: bool, the same shape, whole.

    Returns:
        The same tensor.

    Example:
        >>> zero_dropped_(torch.tensor([1.0, float("nan")]), torch.tensor([True, False]))
        tensor([1., 0.])
    """
    if is_sharded(tensor):
        zero_dropped_(local(tensor), own_part(mask, tensor))
        return tensor
    if tensor.is_sparse:
        return tensor.copy_(zero_dropped(tensor, mask))
    if not _mask_bits_(tensor, mask):
        tensor.masked_fill_(~mask, 0)
    return tensor


def zero_dropped(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return a tensor, strided or sparse, with 0 where `mask` is False."""
    if not tensor.is_sparse:
        return torch.where(mask, tensor, 0)
    tensor = tensor.coalesce()
    values = torch.where(mask[tuple(tensor.indices())], tensor.values(), 0)
    return torch.sparse_coo_tensor(tensor.indices(), values, tensor.shape, check_invariants=False, is_coalesced=True)


def has_stray(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return whether a tensor is not 0 somewhere where `mask` is False, as a bool on its device; NaN and inf say nothing.

    Args:
        tensor: floating point, any shape; of a sharded one, the part of this rank is looked at.
        mask: bool, the same shape, whole.
    """
    own, mask = local(tensor), own_part(mask, tensor)
    if own.dtype is torch.float32 and _lie_alike(own, mask) and (library := _native_for(own, mask)):
        return torch.tensor(bool(library.sparsify_has_stray(own.data_ptr(), mask.data_ptr(), own.numel(), threads())))
    return own[own.ne(0).gt(mask)].isfinite().any()  # few, as a rule


def _lie_alike(tensor: Tensor, mask: Tensor) -> bool:
    """Whether both fill the same places of memory that is the CPU's."""
    if not tensor.is_cpu or tensor.stride() != mask.stride() or is_legacy_batchedtensor(tensor):
        return False
    return tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor)


def _native_for(tensor: Tensor, mask: Tensor) -> Any:
    return native() if is_plain(tensor) and is_plain(mask) else None


def _mask_bits_(tensor: Tensor, mask: Tensor) -> bool:
    """Multiply the bits of a tensor by a mask if both lie alike in memory; return whether they do."""
    integer = _INTEGERS.get(tensor.dtype)
    if integer is None or not _lie_alike(tensor, mask):
        return False
    if library := _native_for(tensor, mask):
        library.sparsify_zero_dropped(tensor.data_ptr(), mask.data_ptr(), tensor.numel(), tensor.element_size(), threads())
        if not tensor.is_inference():
            increment_version(tensor)
        return True
    bits, keep = tensor.view(integer), mask.view(torch.int8)  # of integers, since NaN * 0 is 0 there
    if tensor.numel() <= _CHUNK:
        bits.mul_(keep)
        return True
    flat = (t.as_strided((t.numel(),), (1,)).split(_CHUNK) for t in (bits, keep))
    for chunk, kept in zip(*flat, strict=True):
        chunk.mul_(kept)
    return True


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is its memory: not fake, nor wrapped by a transform."""
    return type(tensor) in (Tensor, nn.Parameter) and not is_functorch_wrapped_tensor(tensor)


class MaskGradient(torch.autograd.Function):
    """Identity whose backward keeps the gradient of kept weights only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor, own: bool) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.own = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        mask, grad = ctx.saved_tensors[0].bool(), grads[0]  # hooks on saved tensors may have made numbers of it
        if torch.compiler.is_compiling():
            return torch.where(mask, grad, 0), None, None
        # In place where nothing else can see it: the gradient of a product comes fresh out of it, while an addition hands one
        # gradient to both its operands. One that is itself differentiated is not ours to write either.
        if ctx.own and not torch.is_grad_enabled() and _mask_bits_(grad, mask):
            return grad, None, None
        return zero_dropped(grad, mask), None, None


class MaskTangent(MaskGradient):
    """The same with forward-mode derivatives (torch.func.jvp, hessian), which torch.compile does not trace."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        MaskGradient.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return torch.where(ctx.saved_tensors[0], tangents[0], 0)


class _AsGiven(inspect.Signature):
    """Binds arguments as they are. torch binds those of every `apply`, at three times the cost of the function."""

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        return SimpleNamespace(args=args, kwargs=kwargs, apply_defaults=lambda: None)


MaskGradient.forward.__signature__ = _AsGiven()  # pyright: ignore[reportFunctionMemberAccess]


class FiniteGradient(torch.autograd.Function):
    """Identity whose backward lets NaN and inf pass only where a weight is not 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0] != 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.where(ctx.saved_tensors[0].bool(), grads[0], grads[0].nan_to_num(0.0, 0.0, 0.0))


class FiniteTangent(FiniteGradient):
    """The same with forward-mode derivatives."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        FiniteGradient.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0] != 0)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return torch.where(ctx.saved_tensors[0], tangents[0], tangents[0].nan_to_num(0.0, 0.0, 0.0))
