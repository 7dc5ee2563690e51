"""Pending: gradients of whole weights that only their kept values are stored of, until an update asks for them.

The step whose dense gradient decides growth has to know the gradient of dropped weights too, and a parameter that holds kept
values has no place for it. What a backward pass knows, the input of a layer and the gradient of its output, often takes less
memory than their product; the gradient is kept as whichever is smaller, and is a whole tensor when an update looks at it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_PENDING: Any = WeakTensorKeyDictionary()  # by mask
_APART = 1e-3  # of its size: how far a gradient may be from a multiple of what the backward pass found


class Pending:
    """The gradient of one whole weight, over all backward passes of a step.

    Args:
        shape: of the weight.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self._sum: Tensor | None = None
        self._products: list[tuple[Callable[[], Tensor], tuple[Tensor, ...], list[int]]] = []

    def add(self, gradient: Tensor) -> None:
        """Add a whole gradient."""
        self._sum = gradient.clone() if self._sum is None else self._sum + gradient

    def add_product(self, product: Callable[[], Tensor], *factors: Tensor) -> None:
        """Add what a function returns, later if its factors are smaller than it is; they are not copied."""
        self._products.append((product, factors, [factor._version for factor in factors]))
        if sum(factor.numel() for _, own, _ in self._products for factor in own) > math.prod(self.shape):
            self._multiply()

    def _multiply(self) -> None:
        self._sum, self._products = self.whole(), []

    def tensors(self) -> list[Tensor]:
        """Return what is held."""
        own = [] if self._sum is None else [self._sum]
        return own + [factor for _, factors, _ in self._products for factor in factors]

    def whole(self) -> Tensor:
        """Return the sum, which is not kept where it takes more memory than its factors."""
        found = self._sum
        for product, factors, versions in self._products:
            if [factor._version for factor in factors] != versions:
                raise RuntimeError(
                    "An activation was written to between the backward pass and the optimizer's step, which needs it to choose "
                    "the weights that grow. Leave activations alone until then, or decompress() the model."
                )
            found = product() if found is None else found + product()
        assert found is not None
        return found


def pending(mask: Tensor) -> Pending | None:
    """Return what backward passes left for the weight of a mask, if anything."""
    return _PENDING.get(mask)


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
    _PENDING.pop(mask, None)


def pending_or_new(mask: Tensor) -> Pending:
    """Return what collects the gradient of the weight of a mask."""
    return _PENDING.setdefault(mask, Pending(mask.shape))


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
