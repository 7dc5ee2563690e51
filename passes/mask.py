"""Mask: one mask and its rule, the only place that knows what a masked weight does."""

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from passes.host import Guest
from passes.shards import is_sharded, local, own_part

_INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
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
        return tensor.copy_(_masked(tensor, mask))
    if not _mask_bits_(tensor, mask):
        tensor.masked_fill_(~mask, 0)
    return tensor


def _masked(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return a tensor, strided or sparse, with 0 where `mask` is False."""
    if not tensor.is_sparse:
        return torch.where(mask, tensor, 0)
    tensor = tensor.coalesce()
    values = torch.where(mask[tuple(tensor.indices())], tensor.values(), 0)
    return torch.sparse_coo_tensor(tensor.indices(), values, tensor.shape, check_invariants=False, is_coalesced=True)


def _mask_bits_(tensor: Tensor, mask: Tensor) -> bool:
    """Multiply the bits of a tensor by a mask where they lie in memory alike, and tell whether they do."""
    integer = _INTEGERS.get(tensor.dtype) if tensor.is_cpu and tensor.stride() == mask.stride() else None
    if integer is None or not (tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor)):
        return False
    bits, keep = tensor.view(integer), mask.view(torch.int8)  # of integers, since NaN * 0 is 0 there
    if tensor.numel() <= _CHUNK:
        bits.mul_(keep)
        return True
    flat = (t.as_strided((t.numel(),), (1,)).split(_CHUNK) for t in (bits, keep))
    for chunk, kept in zip(*flat, strict=True):
        chunk.mul_(kept)
    return True


_STRAY = (
    "Dropped weights were written to, past their mask, which goes on hiding them. If a training loop averages the floating "
    "entries of a state_dict, let it copy the masks too (all entries; torch.optim.swa_utils.AveragedModel does); if an "
    "optimizer trains this model, attach it: model.updater.attach(optimizer, total_steps=...)."
)


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
        # In place where nothing else can see it: the gradient of a product comes fresh out of it, while an addition hands one
        # gradient to both its operands. One that is itself differentiated is not ours to write either.
        if ctx.own and not torch.compiler.is_compiling() and not torch.is_grad_enabled() and _mask_bits_(grad, mask):
            return grad, None, None
        return _masked(grad, mask), None, None


class MaskTangent(MaskGradient):
    """The same with forward-mode derivatives (torch.func.jvp, hessian), which torch.compile does not trace."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        MaskGradient.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return torch.where(ctx.saved_tensors[0], tangents[0], 0)


# torch binds the arguments of every `apply` to this signature; without it, it would work the signature out each time.
MaskGradient.forward.__signature__ = inspect.signature(MaskGradient.forward)  # pyright: ignore[reportFunctionMemberAccess]


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
        return torch.where(ctx.saved_tensors[0], grads[0], grads[0].nan_to_num(0.0, 0.0, 0.0))


# How a value is used that goes through a mask; a graph names it where it is not a weight as it is.
PRODUCT = "product"  # the weight, by a product and nothing else: its gradient is fresh
INNER = "inner"  # the weight, by a computation of another weight from it (standardised, normalised)
OUTER = "outer"  # the result of that
BESIDE = "beside"  # another parameter in that, such as the norms of weight normalisation


class Mask(Guest):
    """One mask and its rule: how a weight is used in training, in evaluation, and when its gradient decides growth.

    The parameter is kept masked by whoever changes it, so training reads it as it is and masks its gradient. Evaluation
    applies the mask, so that averaged or tampered weights stay sparse, and so does training until an optimizer is attached,
    whenever something has written to dropped weights, since nobody keeps those masked. While `dense_gradient` is set,
    training returns the parameter itself and its `.grad` is dense, and so it is in evaluation where gradients are computed
    there.

    A weight that is transformed before use is masked before and after. Where all that a norm is taken of is 0, dropped or newly
    grown, the transformation may divide by 0: that gives 0, and the NaN that comes back through it ends here.

    Args:
        mask: bool, the shape and strides of its weight.
        nonzeros: the number of True elements, which the host keeps so that nobody has to ask the device.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, nonzeros: int) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.nonzeros = nonzeros
        self.dense_gradient = False
        self.attended = False  # whether an attached optimizer keeps the weight masked
        self._looked: tuple[Any, Any, bool] = (
            None,
            self._written(),
            False,
        )  # traces of weight and mask; whether they agreed
        self._said = False

    @property
    def nonzeros(self) -> int:
        """The number of True elements; counted anew where others wrote to the mask, as averaging of models does."""
        if self._counted != self._written() and not self.mask.is_meta:
            self.nonzeros = int(self.mask.sum())
        return self._nonzeros

    @nonzeros.setter
    def nonzeros(self, count: int) -> None:
        self._nonzeros, self._counted = count, self._written()

    def _written(self) -> tuple[int, int]:
        # Every write in place moves the version; tensors of inference mode have none.
        return id(self.mask), 0 if self.mask.is_inference() else self.mask._version

    @property
    def density(self) -> float:
        """The kept fraction, in (0, 1]."""
        return self.nonzeros / self.mask.numel()

    def forward(self, weight: Tensor, role: str | None = None, source: Tensor | None = None) -> Tensor:
        """Return the weight as its consumer must see it in the current mode.

        Args:
            weight: the parameter, or what was computed from it or with it.
            role: PRODUCT, INNER, OUTER or BESIDE, where one of them holds.
            source: the parameter, masked, with the last two.
        """
        if role == BESIDE and source is not None:
            return self._beside(weight, source)
        if role == OUTER and source is not None:
            weight = torch.where((source == 0) & ~weight.isfinite(), 0, weight)
        kept = self.training and role != OUTER and (self.attended or self._is_kept(weight))
        if torch.is_grad_enabled() and self.dense_gradient:  # in this order, so that evaluation is one compiled graph
            finite = weight if kept else weight.nan_to_num(0.0, 0.0, 0.0)
            masked = weight if kept else torch.where(self.mask, weight, finite - finite.detach())  # its gradient is not
        elif kept:
            function = MaskGradient if torch.compiler.is_compiling() else MaskTangent
            masked = function.apply(weight, self.mask, role == PRODUCT)
        else:
            masked = torch.where(self.mask, weight, 0)
        return FiniteGradient.apply(masked) if role == INNER else masked

    def _beside(self, other: Tensor, source: Tensor) -> Tensor:
        """Give a parameter that is broadcast over the weight no gradient where everything it meets is 0."""
        alive = source.detach() != 0
        for dim, (size, whole) in enumerate(zip(other.shape, alive.shape, strict=True)):
            alive = alive if size == whole else alive.any(dim, keepdim=True)
        function = MaskGradient if torch.compiler.is_compiling() else MaskTangent
        return function.apply(other, alive, False)

    def read(self, weight: Tensor) -> Tensor:
        """Return the weight as Python code must see it that reads it as an attribute.

        A view of the parameter wherever that is masked already, so that what the code writes to it is not lost.
        """
        if self.training or self.dense_gradient or not self._is_kept(weight):
            return self(weight)
        return MaskTangent.apply(weight, self.mask, False)

    def _is_kept(self, weight: Tensor) -> bool:
        """Whether dropped weights are 0, where that is known without waiting: looked at once after every write."""
        if torch.compiler.is_compiling() or not isinstance(weight, nn.Parameter) or not weight.is_cpu:
            return False
        return self.look(weight)

    def look(self, weight: nn.Parameter) -> bool:
        """Tell whether dropped weights are 0, unless it was told since the last write; warn where they are not.

        Where the mask was written too, as by averages that take it over from their model, they become 0. Waits for the device.
        """
        if weight.is_meta or weight.is_inference() or is_sharded(weight):
            return False
        before, written = self._looked[:2]
        if before != _trace(weight) or written != self._written():
            kept = not bool((weight.detach() != 0).logical_and_(~self.mask).any())
            if not kept and written != self._written():
                with torch.no_grad():
                    zero_dropped_(weight, self.mask)
                kept = True
            elif not kept and not self._said:
                self._said = True
                warnings.warn(_STRAY, stacklevel=2)
            self._looked = _trace(weight), self._written(), kept
        return self._looked[2]

    def extra_repr(self) -> str:
        """Name the density and the count."""
        return f"density={self.density:.4g}, {self.nonzeros} of {self.mask.numel()}"

    def __getstate__(self) -> dict[str, Any]:
        # The flag belongs to the optimizer that is attached; a copy has none, and versions of its own.
        return {**vars(self), "dense_gradient": False, "attended": False, "_counted": None, "_said": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._looked = None, self._written(), False


def _trace(weight: Tensor) -> tuple[int, int]:
    """Return what changes when a weight is written to: writes in place raise its version, `weight.data = ...` moves it."""
    return weight._version, weight.data_ptr()


def masks_of(model: nn.Module) -> dict[str, Mask]:
    """Return the masks of a model by the name of the parameter each masks."""
    found: dict[nn.Parameter, tuple[str, Mask]] = {}
    for path, module in model.named_modules():  # in the order of named_parameters(), whose first name counts
        for attribute, weight in module._parameters.items():
            mask = module._modules.get(f"{attribute}_mask")
            if weight is not None and isinstance(mask, Mask):
                found.setdefault(weight, (f"{path}.{attribute}" if path else attribute, mask))
    return dict(found.values())


@torch.no_grad()
def zero_dropped_weights_(model: nn.Module) -> None:
    """Set every dropped weight of a masked model to 0, in place."""
    for name, mask in masks_of(model).items():
        if not mask.mask.is_meta:
            zero_dropped_(model.get_parameter(name), mask.mask)
