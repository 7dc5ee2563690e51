"""Parts: the kept weights of a layer as its output, and its gradients, are summed up."""

import ctypes
import itertools
from typing import Any

from passes.kernels.costs import Machine
from passes.kernels.planes import Part, Tap
from passes.kernels.sums import Prepared
from passes.kernels.windows import Kept, Lying, Window


def forward_sum(
    library: ctypes.CDLL,
    kept: Kept,
    window: Window,
    x: Lying,
    y: Lying,
    machine: Machine,
    tables: dict[Any, Any],
    *,
    gradient: bool = False,
) -> Prepared:
    """Return the sum that is a layer's output, or that whose gradient is that of the weight.

    Args:
        library: the native one.
        kept: the kept weights.
        window: what it looks at.
        x, y: input and output.
        machine: what it runs on.
        tables: of these weights, made before.
        gradient: whether it is for the gradient, where a weight takes a vector of the cache.
    """
    sides = []
    for size, s, p, d in zip(kept.shape[2:], window.stride, window.padding, window.dilation, strict=True):
        first = [d * i - p for i in range(size)]  # where the first output finds its pixel
        phases = sorted({place % s for place in first})
        sides.append((phases, [(phases.index(place % s), place // s) for place in first]))
    (row_phases, rows), (column_phases, columns) = sides
    part = Part(
        target=y,
        shift=0,
        transposed=False,
        taps=[Tap(i * len(column_phases) + j, row, column) for (i, row), (j, column) in itertools.product(rows, columns)],
        phases=list(itertools.product(row_phases, column_phases)),
        stride=window.stride,
        pointwise=window.pointwise(kept.shape[2:]),
    )
    return Prepared(library, kept, x, [part], machine, tables, gradient=gradient)


def input_sum(
    library: ctypes.CDLL, kept: Kept, window: Window, x: Lying, y: Lying, machine: Machine, tables: dict[Any, Any]
) -> Prepared:
    """Return the sums that are the gradient of a layer's input, one for every phase of the stride."""
    (sy, sx), (py, px), (dy, dx) = window.stride, window.padding, window.dilation
    images, channels, rows, columns = x.shape
    parts = []
    for fy, fx in itertools.product(range(min(sy, rows)), range(min(sx, columns))):
        down, across = (
            [first + p - d * i for i in range(size)]
            for first, p, d, size in ((fy, py, dy, kept.shape[2]), (fx, px, dx, kept.shape[3]))
        )
        shape = (images, channels, -(-(rows - fy) // sy), -(-(columns - fx) // sx))
        part = Part(
            target=Lying(shape, (*x.strides[:2], x.strides[2] * sy, x.strides[3] * sx)),
            shift=fy * x.strides[2] + fx * x.strides[3],
            transposed=True,
            taps=[None if a % sy or b % sx else Tap(0, a // sy, b // sx) for a, b in itertools.product(down, across)],
            phases=[(0, 0)],
            stride=(1, 1),
            pointwise=window.pointwise(kept.shape[2:]),
        )
        parts.append(part)
    return Prepared(library, kept, y, parts, machine, tables)
