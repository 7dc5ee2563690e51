"""Windows: what a layer looks at, how its tensors lie, and which of its weights are kept."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from torch import Tensor

GROUPS = (4, 2, 1)  # how many outputs that follow each other the kernels can sum up together


def with_pixels(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a weight's shape with rows and columns: 1 for a linear layer, and one row for a convolution along a line."""
    return (*shape[:2], *(1,) * (4 - len(shape)), *shape[2:])


@dataclass(frozen=True)
class Window:
    """What a convolution looks at: of rows, and of columns; and its groups."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def out(self, shape: Sequence[int], weight: Sequence[int]) -> tuple[int, int, int, int]:
        """Return the shape of the output: (images, outputs, rows, columns)."""
        around = zip(shape[2:], self.padding, self.dilation, weight[2:], self.stride, strict=True)
        rows, columns = ((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, p, d, k, s in around)
        return shape[0], weight[0], rows, columns

    def pointwise(self, kernel: Sequence[int]) -> bool:
        """Whether a pixel only looks at the one at its place."""
        return (*kernel, *self.stride, *self.padding) == (1, 1, 1, 1, 0, 0)


class Lying(NamedTuple):
    """The shape of a tensor of images, (images, channels, rows, columns), and its strides."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> "Lying":
        """Return how a tensor of images lies."""
        return Lying(tuple(tensor.shape), tensor.stride())


@dataclass(frozen=True)
class Kept:
    """The kept weights of a layer.

    Attributes:
        shape: of the dense weight: (outputs, inputs of a group, rows, columns).
        groups: convolution groups.
        last: whether the dense weight lies with its inputs last.
        places: (kept,) int32, in the dense weight as it lies, ascending.
        index: (kept,) int32, in the weight as it is stored, ascending too.
        elements: of that.
        group: consecutive outputs that share a pattern: one of `GROUPS`.
    """

    shape: tuple[int, ...]
    groups: int
    last: bool
    places: np.ndarray
    index: np.ndarray
    elements: int
    group: int

    @staticmethod
    def of(mask: np.ndarray, groups: int, last: bool, *, group: int | None = None) -> "Kept":
        """Return the weights that a mask keeps.

        Args:
            mask: (outputs, inputs, rows, columns) bool, or without rows, or columns too.
            groups: convolution groups.
            last: whether the dense weight lies with its inputs last.
            group: consecutive outputs that share a pattern, if that is known.
        """
        mask = mask.reshape(with_pixels(mask.shape))
        places = np.flatnonzero(mask.transpose(0, 2, 3, 1) if last else mask).astype(np.int32)
        return Kept(mask.shape, groups, last, places, places, mask.size, group or _sharing(mask, groups))

    def alone(self) -> "Kept":
        """Return the same weights where their values are stored alone, without any zeros between."""
        return replace(self, index=np.arange(len(self.index), dtype=np.int32), elements=len(self.index))


def _sharing(mask: np.ndarray, groups: int) -> int:
    """Return how many consecutive outputs share a pattern, wherever one looks."""
    outputs, rows = mask.shape[0] // groups, mask.reshape(mask.shape[0], -1)

    def shared(rows: np.ndarray, count: int) -> bool:
        return all((rows[0::count] == rows[other::count]).all() for other in range(1, count))

    return next(n for n in GROUPS if outputs % n == 0 and shared(rows[:64], n) and shared(rows, n))
