"""Pending: gradients of whole weights that only their kept values are stored of, until an update asks for them.

The step whose dense gradient decides growth has to know the gradient of dropped weights too, and a parameter that holds kept
values has no place for it. What a backward pass knows, the input of a layer and the gradient of its output, often takes less
memory than their product; the gradient is kept as whichever is smaller, and is a whole tensor when an update looks at it. Where
an update looks at its largest values only, and steps have one backward pass, these are all that is kept of a product.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_APART = 1e-3  # of its size: how far a gradient may be from a multiple of what the backward pass found


class Summary(Protocol):
    """What an update looks at of a gradient."""

    def tensors(self) -> list[Tensor]:
        """Return what is held."""
        ...

    def whole(self) -> Tensor:
        """Return a gradient of the weight's shape, in which an update sees the same."""
        ...


class Pending:
    """The gradient of one whole weight, over all backward passes of a step.

    Args:
        shape: of the weight.
        summarize: what is kept of a gradient and a mask, if the step has no other pass; None keeps gradients whole.
    """

    def __init__(self, shape: Sequence[int], summarize: Callable[[Tensor, Tensor], Summary] | None = None) -> None:
        self.shape = tuple(shape)
        self._summarize, self._passes = summarize, 0
        self._sum: Tensor | None = None
        self._summary: Summary | None = None  # instead
        self._products: list[tuple[Callable[[], Tensor], tuple[Tensor, ...], list[int]]] = []

    def add(self, gradient: Tensor, mask: Tensor) -> None:
        """Add a whole gradient of the weight of a mask."""
        self._passes += 1
        if not self._lost():
            self._keep(gradient if self._sum is None else self._sum + gradient, mask)

    def add_product(self, product: Callable[[], Tensor], factors: Sequence[Tensor], mask: Tensor) -> None:
        """Add what a function returns, later if its factors are smaller than it is; they are not copied."""
        self._passes += 1
        if self._lost():
            return
        self._products.append((product, tuple(factors), [factor._version for factor in factors]))
        if sum(factor.numel() for _, own, _ in self._products for factor in own) > math.prod(self.shape):
            total, self._products = self.whole(), []
            self._keep(total, mask)

    def _keep(self, total: Tensor, mask: Tensor) -> None:
        if self._summarize and self._passes == 1:
            self._sum, self._summary = None, self._summarize(total, mask)
        else:
            self._sum = total

    def _lost(self) -> bool:
        """Whether there was another pass after one of which the largest values only are there."""
        return self._passes > 1 and self._summary is not None

    def tensors(self) -> list[Tensor]:
        """Return what is held."""
        own = self._summary.tensors() if self._summary else [] if self._sum is None else [self._sum]
        return own + [factor for _, factors, _ in self._products for factor in factors]

    def whole(self) -> Tensor:
        """Return the sum, which is not kept where it takes more memory than its factors; NaN if it is not known."""
        if self._lost():
            warnings.warn(
                "A step that decides which weights grow had several backward passes, and all steps before it one: their sum is "
                "not known, and the update is skipped.",
                stacklevel=2,
            )
            return torch.full(self.shape, torch.nan)
        found = self._summary.whole() if self._summary else self._sum
        for product, factors, versions in self._products:
            if [factor._version for factor in factors] != versions:
                raise RuntimeError(
                    "An activation was written to between the backward pass and the optimizer's step, which needs it to choose "
                    "the weights that grow. Leave activations alone until then, or decompress() the model."
                )
            found = product() if found is None else found + product()
        assert found is not None
        return found


@dataclass
class _Known:
    """What is known of the passes of a weight.

    Attributes:
        pending: of this step.
        passes, most: of this step, and at most of those before.
        summarize: for the gradients of this step.
    """

    pending: Pending | None = None
    passes: int = 0
    most: int = 0
    summarize: Callable[[Tensor, Tensor], Summary] | None = None


_KNOWN: Any = WeakTensorKeyDictionary()  # by mask


def _known(mask: Tensor) -> _Known:
    return _KNOWN.setdefault(mask, _Known())


def pending(mask: Tensor) -> Pending | None:
    """Return what backward passes left for the weight of a mask, if anything."""
    return _known(mask).pending


def begin(mask: Tensor, gradient: Tensor | None) -> None:
    """Forget what is left of a step whose gradients were given up: in a forward pass, before there is a gradient.

    Args:
        mask: of a weight.
        gradient: of its kept values, as the parameter has it now.
    """
    computing = torch._C._current_graph_task_id() != -1  # checkpoints run forward passes within backward ones
    if not computing and (gradient is None or not gradient.any()):
        forget(mask)


def forget(mask: Tensor) -> None:
    """Forget what backward passes left."""
    _known(mask).pending = None


def pending_or_new(mask: Tensor) -> Pending:
    """Return what collects the gradient of the weight of a mask."""
    known = _known(mask)
    known.pending = known.pending or Pending(mask.shape, known.summarize)
    return known.pending


def count_pass(mask: Tensor) -> None:
    """Count a backward pass through the weight of a mask."""
    _known(mask).passes += 1


def end_step(mask: Tensor) -> None:
    """Begin to count the backward passes of another step."""
    known = _known(mask)
    known.passes, known.most = 0, max(known.passes, known.most)


def keep(mask: Tensor, summarize: Callable[[Tensor, Tensor], Summary] | None) -> None:
    """Let the next step keep a summary of the weight's gradient, if every step so far had one backward pass.

    Args:
        mask: of the weight.
        summarize: what makes it of a gradient and the mask; None keeps gradients whole. It must not hold the mask.
    """
    known = _known(mask)
    known.summarize = summarize if known.most == 1 else None


def like_values(whole: Tensor, mask: Tensor, values: Tensor) -> tuple[Tensor, bool]:
    """Scale a whole gradient as others have scaled that of its kept values since: by clipping, or a scaler of gradients.

    Args:
        whole: as the backward passes found it.
        mask: bool, of the same shape.
        values: (kept, 1), the gradient that the optimizer sees.

    Returns:
        The gradient, and whether the optimizer's is a multiple of it.
    """
    own, seen = whole[mask].double(), values.flatten().double()
    size = own.dot(own)
    if not (size > 0 and size.isfinite() and seen.isfinite().all()):
        return whole, True
    factor = own.dot(seen) / size
    same = bool((seen - factor * own).norm() <= _APART * seen.norm())
    return (whole * factor.to(whole.dtype) if same and abs(factor - 1) > _APART else whole), same
