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

    Dense, two vectors of products take 1.2, a number read or written 0.6, and a weight 2 besides; to mask a weight and its
    gradient takes 1.4. With kept weights only, one vector takes 1.2, a number 1.8, since it is copied, a weight 1.5, and a kept
    one 25 besides, since it is looked up. Calls are of three operators, or twice as many to mask, and Python between them.

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
    dense = 0.6 * size * pixels / max(lanes, 1) / share + 0.6 * numbers + 2 * size + 3 * CALL
    sparse = 1.2 * kept * pixels / lanes + 1.8 * numbers + 25 * kept + 1.5 * size + 12 * CALL if lanes else math.inf
    return TrainingCycles(dense, dense + 1.4 * size + 3 * CALL, sparse)
