"""Emit: steps, one after the other, and the planes that they write."""

from collections.abc import Sequence, Set
from typing import Any

import numpy as np

from passes.kernels.compiler import threads
from passes.kernels.steps import ACTIVATIONS, Kind
from passes.lowering.layout import Grid, Shape, grid
from passes.lowering.memory import Memory, Planes
from passes.lowering.program import Op
from passes.lowering.windows import Window

_NO_ACTIVATION = ("none", 0.0, 0.0)


class Emitter:
    """Steps in order.

    Attributes:
        shapes, grids: of all values of a program.
        framed: which values are looked at around their pixels too, where zeros are then written.
        planes: of the values so far.
        memory: where they lie.
        names: for each step, the node whose result it computes; "" where it only brings numbers elsewhere.
        copied: how many numbers are written by steps other than convolutions.
    """

    def __init__(self, shapes: Sequence[Shape], grids: Sequence[Grid], framed: Set[int]) -> None:
        """Begin with no step."""
        self.shapes, self.grids, self.framed = shapes, grids, framed
        self.planes: list[Planes] = []
        self.memory = Memory()
        self.names: list[str] = []
        self.copied = 0
        self._steps: list[dict[str, Any]] = []

    def new(self, value: int) -> Planes:
        """Return new planes for a value, which the next step writes."""
        return self.memory.new(self.shapes[value].channels, self.grids[value])

    def compute(self, kind: Kind, value: int, fields: dict[str, Any], op: Op | None = None) -> None:
        """Add the step that writes a value."""
        fields = {"framed": int(value in self.framed), **fields}
        self.step(kind, self.planes[value], self.shapes[value], self.grids[value], fields, op)

    def step(self, kind: Kind, target: Planes, shape: Shape, lying: Grid, fields: dict[str, Any], op: Op | None = None) -> None:
        """Add a step.

        Args:
            kind: what it does.
            target: the planes that it writes, or reads if it writes to a tensor.
            shape: of these planes.
            lying: how they lie.
            fields: others of `Step`. Planes become tables of where they are, functions what they return once that is known.
            op: what it computes.
        """
        name, low, high = op.activation if op else _NO_ACTIVATION
        own = {"kind": kind, "channels": shape.channels, "rows": shape.rows, "columns": shape.columns}
        own |= {"pitch": lying.pitch, "lead": lying.lead, "tail": lying.tail, "target": target}
        own |= {"activation": ACTIVATIONS.index(name), "low": low, "high": high}
        grain = fields.get("grain") or max(1, min(16, 8192 // shape.pixels, -(-shape.channels // (2 * threads()))))
        own |= {"grain": grain, "items": -(-shape.channels // grain)}
        for planes in (target, fields.get("source"), fields.get("other")):
            if isinstance(planes, Planes):
                self.memory.use(planes)
        self.memory.next_step()
        self._steps.append({**own, **fields})
        self.names.append(op.name if op else "")
        self.copied += 0 if kind in (Kind.CONVOLVE, Kind.DOTS) else shape.channels * shape.pixels

    def steps(self) -> tuple[list[dict[str, Any]], int]:
        """Place all planes; return the fields of all steps, and how many numbers the planes take."""
        floats = self.memory.place()
        placed = [{k: v.offsets() if isinstance(v, Planes) else v for k, v in step.items()} for step in self._steps]
        return [{k: v() if callable(v) else v for k, v in step.items()} for step in placed], floats

    def read(self, value: int, same: bool) -> None:
        """Read an input, which may be the same for all images."""
        shape, planes = self.shapes[value], self.new(value)
        self.planes.append(planes)
        strides = shape.strides()
        source = (np.arange(shape.channels) * strides["channel_stride"]).astype(np.int32)
        boxes = np.tile(np.array([0, shape.rows, 0, shape.columns], np.int32), (shape.channels, 1))
        fields = {
            "outside": value,
            "image_stride": 0 if same else shape.channels * shape.pixels,
            "source": source,
            "boxes": boxes,
        }
        self.compute(Kind.READ, value, {**fields, **strides})

    def write(self, output: int, value: int) -> None:
        """Write a value to an output."""
        shape, planes = self.shapes[value], self.planes[value]
        even = len(planes.buffers) == 1 and shape.channels > 1 and len({*np.diff(planes.place).tolist()}) == 1
        fields = {"outside": output, "image_stride": shape.channels * shape.pixels, "source": planes, "even": int(even)}
        self.step(Kind.WRITE, planes, shape, self.grids[value], {**fields, **shape.strides()})

    def move(self, value: int, window: Window, rows: int, columns: int, pitch: int) -> tuple[Planes, Grid]:
        """Copy planes with padding around, so that a window of any stride and padding is one of stride 1 without.

        Args:
            value: what to copy.
            window: that is going to look at it, at so many `rows` and `columns`.
            rows, columns: of what comes out.
            pitch: from one row of what comes out to the next.

        Returns:
            The planes, for every channel one for each phase of the stride, rows first, and how they lie.
        """
        shape, reach, (sy, sx), (py, px) = self.shapes[value], window.reach(), window.stride, window.padding
        size, from_pitch = (rows + reach[0], columns + reach[1]), self.grids[value].pitch
        lying = grid(size[0], max(pitch, size[1]), 0)
        boxes, shifts = [], []
        for y in window.phases(0):
            for x in window.phases(1):
                top, bottom = -((y - py) // sy), -(-(shape.rows + py - y) // sy)
                left, right = -((x - px) // sx), -(-(shape.columns + px - x) // sx)
                first_row, first_column = max(top, 0), max(left, 0)
                last_row, last_column = max(min(bottom, size[0]), first_row), max(min(right, size[1]), first_column)
                boxes.append([first_row, last_row, first_column, last_column])
                shifts.append((y - py) * from_pitch + x - px)
        moved = Shape(shape.channels * len(boxes), *size, False, 4)
        target = self.memory.new(moved.channels, lying)
        table = np.tile(np.array(boxes, np.int32), (shape.channels, 1))
        source = self.planes[value].repeated(len(boxes)).shifted(np.tile(shifts, shape.channels))
        strides = {"row_stride": sy * from_pitch, "column_stride": sx, "channel_stride": 0}
        self.step(Kind.MOVE, target, moved, lying, {"source": source, "boxes": table, **strides})
        return target, lying
