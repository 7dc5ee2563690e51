"""Parts: the kept weights of a layer as its output, and its gradients, are summed up."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from passes.kernels.costs import Machine
from passes.kernels.order import by_size
from passes.kernels.planes import Part
from passes.kernels.sums import Prepared
from passes.kernels.windows import Kept, Lying, Window


def forward_sum(
    kept: Kept,
    kernel: Sequence[int],
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
        kept: the kept weights.
        kernel: rows and columns of the kernel.
        window: what it looks at.
        x, y: input and output.
        machine: what it runs on.
        tables: of these weights, made before.
        gradient: whether it is for the gradient, where a weight takes a vector of the cache.
    """
    order = kept.patterns()
    own = order[:, 0]
    phases, places = [], []
    sides = zip(kernel, (kept.rows[own], kept.columns[own]), window.stride, window.padding, window.dilation, strict=True)
    for size, used, s, p, d in sides:
        phases.append(sorted({(d * i - p) % s for i in range(size)}))
        places.append((np.searchsorted(phases[-1], (d * used - p) % s), (d * used - p) // s))
    (row_phase, rows), (column_phase, columns) = places
    part = Part(
        target=y,
        shift=0,
        outputs=kept.outputs[own] // kept.group,
        inputs=kept.inputs[own],
        order=order,
        index=kept.index,
        planes=row_phase * len(phases[1]) + column_phase,
        rows=rows,
        columns=columns,
        phases=[(a, b) for a in phases[0] for b in phases[1]],
        stride=window.stride,
        elements=kept.elements,
        blocked=window.groups == 1,
        pointwise=window.pointwise(kernel),
    )
    return Prepared(x, [part], machine, tables, gradient=gradient)


def input_sum(
    kept: Kept, kernel: Sequence[int], window: Window, x: Lying, y: Lying, machine: Machine, tables: dict[Any, Any]
) -> Prepared:
    """Return the sums that are the gradient of a layer's input, one for every phase of the stride."""
    by_input = by_size(kept.inputs)
    (sy, sx), (py, px), (dy, dx) = window.stride, window.padding, window.dilation
    images, channels, rows, columns = x.shape
    parts = []
    for fy, fx in itertools.product(range(min(sy, rows)), range(min(sx, columns))):
        down, across = fy + py - dy * kept.rows[by_input], fx + px - dx * kept.columns[by_input]
        meets = (down % sy == 0) & (across % sx == 0)
        order = by_input[meets]
        shape = (images, channels, -(-(rows - fy) // sy), -(-(columns - fx) // sx))
        part = Part(
            target=Lying(shape, (*x.strides[:2], x.strides[2] * sy, x.strides[3] * sx)),
            shift=fy * x.strides[2] + fx * x.strides[3],
            outputs=kept.inputs[order],
            inputs=kept.outputs[order],
            order=order[:, None],
            index=kept.index,
            planes=np.zeros_like(order),
            rows=down[meets] // sy,
            columns=across[meets] // sx,
            phases=[(0, 0)],
            stride=(1, 1),
            elements=kept.elements,
            blocked=window.groups == 1,
            pointwise=window.pointwise(kernel),
        )
        parts.append(part)
    return Prepared(y, parts, machine, tables)
