"""Training costs: what a layer and its gradients take, from a model of the machine."""

import math
from dataclasses import dataclass

from passes.kernels.costs import CALL
from passes.kernels.windows import Window, with_pixels


@dataclass(frozen=True)
class TrainingCycles:
    """About how many cycles one core takes for a layer and its gradients.

    Attributes:
        dense: without masks.
        masked: for torch's operations on the masked weight.
        sparse: for sums over kept weights.
    """

    dense: float
    masked: float
    sparse: float


def training_cycles(lanes: int, shape: tuple[int, ...], weight: tuple[int, ...], kept: int, window: Window) -> TrainingCycles:
    """Return what a layer and its gradients take, by a model fitted to layers of ResNet-50 and WRN-22-2, and linear ones.

    Dense, a vector of products takes 2, a number read or written 6.2, since torch goes over it several times, and a weight
    3.2 besides; to mask a weight and its gradient takes 1.5. With kept weights only, a vector takes 4.5, a number 2.6, a weight
    1.6, and a kept one 37 besides, since it is looked up. Calls are of three operators, or twice as many to mask, with Python.

    Args:
        lanes: numbers in a vector of the native loops; 0 where there are none.
        shape: of the input: (images, inputs, rows, columns).
        weight: the weight's shape.
        kept: how many of its elements are kept.
        window: what it looks at.
    """
    images, outputs, rows, columns = window.out(shape, with_pixels(weight))
    pixels, numbers, size = images * rows * columns, math.prod(shape) + images * outputs * rows * columns, math.prod(weight)
    share = 1.0 if window.groups == 1 else 0.25  # of torch's speed that groups leave
    dense = 2 * size * pixels / max(lanes, 1) / share + 6.2 * numbers + 3.2 * size + 3 * CALL
    sparse = 4.5 * kept * pixels / lanes + 2.6 * numbers + 37 * kept + 1.6 * size + 12 * CALL if lanes else math.inf
    return TrainingCycles(dense, dense + 1.5 * size + 3 * CALL, sparse)
