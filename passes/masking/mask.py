"""Mask: one mask and its rule, the only place that knows what a masked weight does."""

import warnings
import weakref
import zlib
from typing import Any

import torch
from torch import Tensor, nn

from passes.capture.host import Guest
from passes.kernels.values import expand, expand_in_step, gather, give_values, is_compressed
from passes.masking.zeros import FiniteGradient, FiniteTangent, MaskGradient, MaskTangent, is_plain, zero_dropped_
from passes.shards import is_sharded, local

_STRAY = (
    "Dropped weights were written to, past their mask, which goes on hiding them. If a training loop averages the floating "
    "entries of a state_dict, let it copy the masks too (all entries; torch.optim.swa_utils.AveragedModel does); if an "
    "optimizer trains this model, attach it: model.updater.attach(optimizer, total_steps=...)."
)


# How a value is used that goes through a mask; a graph names it where it is not a weight as it is.
PRODUCT = "product"  # the weight, by a product and nothing else: its gradient is fresh
INNER = "inner"  # the weight, by a computation of another weight from it (standardised, normalised)
OUTER = "outer"  # the result of that
BESIDE = "beside"  # another parameter in that, such as the norms of weight normalisation


class Mask(Guest):
    """One mask and its rule: how a weight is used in training, in evaluation, and when its gradient decides growth.

    The updater keeps the parameter masked, so training reads it as it is and masks its gradient. Evaluation
    applies the mask, so that averaged or tampered weights stay sparse, and so does training until an optimizer is attached,
    whenever something has written to dropped weights, since nothing keeps those masked. While `dense_gradient` is set,
    training returns the parameter itself and its `.grad` is dense. This also holds in evaluation mode while gradients are
    enabled.

    A weight that is transformed before use is masked before and after. If every value that enters a norm is 0, dropped
    or newly grown, the transformation may divide by 0. The result is set to 0, and NaN gradients stop here.

    Args:
        mask: bool, the shape and strides of its weight.
        nonzeros: the number of True elements, kept on the host so that the device need not be asked.
    """

    mask: Tensor
    kernels = "masked"  # what runs the layer in training: passes.masking.products
    compressed = False  # whether the parameter holds kept values alone: passes.masking.compressed

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
        )  # trace of weight and mask at the last check; whether dropped weights were 0
        self._said = False
        self._own: Any = None  # a weak reference to the parameter that is masked
        self._places: tuple[Any, int | None] = (None, None)  # of a compressed parameter's values: trace and digest of the mask

    def belongs_to(self, weight: nn.Parameter) -> None:
        """Say which parameter is masked: `functional_call` brings others, which must not be changed or warned of."""
        self._own = weakref.ref(weight)

    @property
    def nonzeros(self) -> int:
        """The number of True elements; counted anew where others wrote to the mask, as averaging of models does."""
        if self._counted != self._written() and not self.mask.is_meta:
            self.nonzeros = int(self.mask.sum())
        return self._nonzeros

    @property
    def last_nonzeros(self) -> int:
        """The same, as it was when it was last counted, for code that is compiled."""
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
        if self._is_values(weight):
            self.check_places()
            dense = torch.is_grad_enabled() and self.dense_gradient and (torch.compiler.is_compiling() or is_plain(weight))
            return expand_in_step(weight, self.mask) if dense else expand(weight, self.mask)
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
        finite_gradient = FiniteGradient if torch.compiler.is_compiling() else FiniteTangent
        return finite_gradient.apply(masked) if role == INNER else masked

    def _beside(self, other: Tensor, source: Tensor) -> Tensor:
        """Give a parameter that is broadcast over the weight no gradient where everything it meets is 0."""
        alive = source.detach() != 0
        for dim, (size, whole) in enumerate(zip(other.shape, alive.shape, strict=True)):
            alive = alive if size == whole else alive.any(dim, keepdim=True)
        function = MaskGradient if torch.compiler.is_compiling() else MaskTangent
        return function.apply(other, alive, False)

    def read(self, weight: Tensor) -> Tensor:
        """Return what Python code gets when it reads the weight as an attribute.

        A view of the parameter wherever that is masked already, so that what the code writes to it is not lost.
        """
        if self.compressed or self.training or self.dense_gradient or not self._is_kept(weight):
            return self(weight)
        return MaskTangent.apply(weight, self.mask, False)

    def saved(self, weight: Tensor) -> Tensor:
        """Return the whole of a compressed parameter."""
        if not self._is_values(weight):
            return weight
        self.check_places()
        return expand(weight, self.mask)

    def _is_values(self, weight: Tensor) -> bool:
        """Whether a weight is a compressed parameter's values: `functional_call` may bring a whole one in its place."""
        return self.compressed and is_compressed(weight, self.mask)

    def load(self, weight: nn.Parameter, state_dict: dict[str, Any], name: str) -> None:
        """Let a compressed parameter take the values that a state_dict's mask keeps, from there or from itself."""
        if not self.compressed:
            return
        given = state_dict.get(name, expand(weight.detach(), self.mask))
        kept = state_dict.get(f"{name}_mask.mask", self.mask)
        if given.shape == kept.shape == self.mask.shape:
            give_values(weight, gather(given.detach(), kept.to(given.device)).to(weight))
            state_dict |= {name: weight.detach()} if name in state_dict else {}
            self.settle_places()

    def _is_kept(self, weight: Tensor) -> bool:
        """Whether dropped weights are 0, where that is known without waiting: looked at once after every write."""
        if torch.compiler.is_compiling() or not isinstance(weight, nn.Parameter) or not weight.is_cpu:
            return False
        return self.look(weight)

    def look(self, weight: nn.Parameter) -> bool:
        """Whether dropped weights are 0, unless it was told since the last write; warn where they are not.

        Where the mask was written too, as by averages that take it over from their model, they become 0. Waits for the device.
        """
        if self._is_values(weight):
            self.check_places()
            return True
        if weight.is_meta or weight.is_inference() or is_sharded(weight):
            return False
        before, written = self._looked[:2]
        if before != trace_of(weight) or written != self._written():
            kept = not bool((weight.detach() != 0).logical_and_(~self.mask).any())
            own = self._own is not None and self._own() is weight
            if not kept and own and written != self._written():
                with torch.no_grad():
                    zero_dropped_(weight, self.mask)
                kept = True
            elif not kept and own and not self._said:
                self._said = True
                warnings.warn(_STRAY, stacklevel=2)
            self._looked = trace_of(weight), self._written(), kept
        return self._looked[2]

    def digest(self) -> int:
        """Return one number for which weights are kept. Waits for the device."""
        return zlib.crc32(self.mask.detach().contiguous().view(torch.uint8).cpu().numpy().data)

    def settle_places(self) -> None:
        """Take the values of a compressed parameter to be those that the mask keeps when it is looked at next."""
        self._places = None, None

    def check_places(self) -> None:
        """Raise if a mask was written to while its parameter holds the values that it kept before."""
        written, before = self._places
        if torch.compiler.is_compiling() or self.mask.is_meta or written == self._written():
            return
        digest = self.digest()
        if before not in (None, digest):  # the same in another place, as `module.to` makes it, is none
            raise RuntimeError(
                "The mask of a compressed parameter was written to: which weights its values belong to is lost. Write to masks "
                "between decompress(model) and compress(model); average compressed models only while their masks are the same."
            )
        self._places = self._written(), digest

    def extra_repr(self) -> str:
        """Name the density and the count."""
        return f"density={self.density:.4g}, {self.nonzeros} of {self.mask.numel()}"

    def __getstate__(self) -> dict[str, Any]:
        # The flag belongs to the optimizer that is attached; a copy has none, and versions of its own.
        fresh = {"dense_gradient": False, "attended": False, "_counted": None, "_said": False, "_own": None}
        return vars(self) | fresh

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._looked = None, self._written(), False
        self._places = None, state["_places"][1]


def trace_of(weight: Tensor) -> tuple[int, int]:
    """Return what changes when a weight is written to: writes in place raise its version, `weight.data = ...` moves it."""
    return weight._version, local(weight).data_ptr()


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
        if not mask.mask.is_meta and not mask.compressed:
            zero_dropped_(model.get_parameter(name), mask.mask)
