"""Sums: a layer with kept weights only, in training: its output, the gradient of its input, and that of its weight.

All three are one loop over kept weights and shifted runs of pixels (`native/sums.h`). The gradient of the input is the sum over
the transposed weight, one for every phase of the stride; that of the weight has a product for every kept weight and no other.
"""

import ctypes
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from passes.kernels.compiler import threads
from passes.kernels.costs import Machine, cut
from passes.kernels.order import Order, inverse, order_of
from passes.kernels.windows import Lying

_INTEGERS, _TABLE = ctypes.c_int64, ctypes.c_void_p
_ROW = 64  # pixels of a row, where they may be cut into rows at will


class Sum(ctypes.Structure):
    """One sum; the fields, and what they mean, are those of `native/sums.h`."""

    _fields_ = (
        *((name, _INTEGERS) for name in ("images", "rows", "columns", "last_columns")),
        *((name, _INTEGERS) for name in ("channels", "source_rows", "source_columns")),
        *((name, _INTEGERS) for name in ("source_image", "source_channel", "source_row", "source_column")),
        *((name, _INTEGERS) for name in ("outputs", "target_image", "target_channel", "target_row", "target_column")),
        *((name, _INTEGERS) for name in ("stride_rows", "stride_columns", "phases")),
        ("shifts", _TABLE),
        *((name, _INTEGERS) for name in ("above", "below", "lead", "pitch", "height", "distance")),
        *((name, _INTEGERS) for name in ("together", "band", "tile", "blocks", "chunks", "widest", "by_chunk")),
        *((name, _TABLE) for name in ("chunk_outputs", "starts", "offsets", "index", "place")),
        *((name, _INTEGERS) for name in ("weights", "elements", "shift")),
    )


@dataclass(frozen=True)
class Part:
    """A part of a target, and the kept weights that add to it.

    Attributes:
        target: the shape of the part, and how it lies.
        shift: of its first number from the start of the target.
        outputs, inputs: (kept,) int, by outputs ascending.
        order: (kept,) int, which of all kept weights they are.
        index: (all kept) int, of these in the dense weight, ascending.
        planes: (kept,) the phase of the stride of the source.
        rows, columns: (kept,) from the output's pixel to the source's within the phase.
        phases: first row and column of the source that a phase has.
        stride: of the source.
        elements: of the dense weight.
        blocked: whether every output looks at all inputs.
        pointwise: whether a pixel only looks at the one at its place.
    """

    target: Lying
    shift: int
    outputs: np.ndarray
    inputs: np.ndarray
    order: np.ndarray
    index: np.ndarray
    planes: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    phases: list[tuple[int, int]]
    stride: tuple[int, int]
    elements: int
    blocked: bool
    pointwise: bool

    @property
    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """The output and the input of every weight."""
        return self.outputs, self.inputs


class Prepared:
    """Sums over the planes of one source, ready to run.

    Attributes:
        records: for the native library, one for every part of the target.
    """

    def __init__(
        self, source: Lying, parts: Sequence[Part], machine: Machine, tables: dict[Any, Any], *, gradient: bool = False
    ) -> None:
        """Prepare sums.

        Args:
            source: what they multiply.
            parts: what they write.
            machine: what they run on.
            tables: of these weights, made before, for sums that need the same; new ones are added.
            gradient: whether they are for the gradient of the weight, where gradients of outputs and, for each weight of a
                block, a vector stay in the next cache.
        """
        if len(parts) == 1 and parts[0].pointwise and _one_run(source) and _one_run(parts[0].target):
            source, parts, last = _in_rows(source, parts[0])
        else:
            last = 0
        images, channels, source_rows, source_columns = source.shape
        rows, columns = (max(part.target.shape[side] for part in parts) for side in (2, 3))
        phases, stride = parts[0].phases, parts[0].stride
        # Planes: no weight finds anything but 0 outside of the source.
        above, left, below, right = (
            max(0, *(edge(places) for part in parts for places in [get(part)])) for get, edge in _EDGES
        )
        high, wide = -(-source_rows // stride[0]), -(-source_columns // stride[1])
        pitch = max(wide + left, columns + right)
        height = max(high + above, rows + below)
        line = channels * len(phases) * pitch * 4
        least = machine.tiles[1] * machine.lanes  # positions, so that registers are full
        fitting = max(machine.next_cache // 2 // line, -(-least // pitch))  # rows
        together = _equal_shares(images, fitting // height)
        band = rows if together > 1 or fitting >= height else min(rows, max(1, fitting - above - below))
        height = band + below if band < rows else height
        if last and images == 1:  # the same planes and tables for any number of pixels
            height = fitting
        lead = -(-(above * pitch + left) // 16) * 16
        floats = lead + (together * height + below) * pitch + right + 2 * 16
        distance = (-(-floats // 16) | 1) * 16
        run = height * pitch if last and images == 1 else ((together - 1) * height + band - 1) * pitch + columns
        pieces = -(-images // together) * -(-rows // band)
        self._tables: list[Any] = []
        self.records = (Sum * len(parts))()
        for number, (record, part) in enumerate(zip(self.records, parts, strict=True)):
            record.images, record.channels = images, channels
            record.source_rows, record.source_columns = source_rows, source_columns
            record.source_image, record.source_channel, record.source_row, record.source_column = source.strides
            _, record.outputs, record.rows, record.columns = part.target.shape
            record.target_image, record.target_channel, record.target_row, record.target_column = part.target.strides
            record.last_columns, record.shift = last or record.columns, part.shift
            record.stride_rows, record.stride_columns = stride
            record.phases, record.weights, record.elements = len(phases), len(part.order), part.elements
            record.above, record.below, record.lead, record.pitch = above, below, lead, pitch
            record.height, record.distance, record.together, record.band = height, distance, together, band
            record.by_chunk = pieces < threads()
            record.tile, block, _ = cut(
                machine,
                len(part.order),
                record.outputs,
                channels,
                height=1 + above + below,
                flat=run,
                pitch=pitch,
                blocked=part.blocked,
                miss=1.2,
            )
            chunks = 4 * threads() if record.by_chunk else 1
            most = 1 << 15
            if gradient:
                chunks = max(chunks, record.outputs * run * 16 // machine.next_cache)
                most = machine.next_cache // 256 * -(-channels // block)
            key = (number, lead, pitch, distance, block, most, chunks, gradient)
            if key not in tables:
                tables[key] = _tables(part, lead, pitch, distance, order_of(*part.sums, record.outputs, block, most, chunks))
            self._tables.append(tables[key])
            record.blocks, record.chunks, record.widest, own = tables[key]
            for name, table in own.items():
                setattr(record, name, table.ctypes.data)

    def run(self, library: ctypes.CDLL, source: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Write the sums over the kept weights of `weight` to the target."""
        given = (source.data_ptr(), target.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr())
        _check(library.sparsify_sum(self.records, len(self.records), *given, threads()))

    def gradient(self, library: ctypes.CDLL, source: Tensor, target: Tensor, weight: Tensor) -> None:
        """Write the gradient of the weight, of that of the target, to `weight`: 0 where nothing is kept."""
        given = (source.data_ptr(), target.data_ptr(), weight.data_ptr())
        _check(library.sparsify_sum_gradient(self.records, *given, threads()))


def _tables(part: Part, lead: int, pitch: int, distance: int, order: Order) -> tuple[int, int, int, dict[str, np.ndarray]]:
    """Return blocks, chunks and the most outputs of a chunk, and the tables of a sum over planes that lie like this."""
    places = inverse(part.order, len(part.index))
    own = places >= 0
    plane = part.inputs * len(part.phases) + part.planes
    offsets = plane * distance + lead + part.rows * pitch + part.columns
    found = {
        "shifts": np.array(part.phases, np.int32),
        "chunk_outputs": order.chunk_groups,
        "starts": order.starts,
        "offsets": offsets[order.order].astype(np.int32),
        "index": part.index[own].astype(np.int32),
        "place": inverse(order.order, len(part.order))[places[own]],
    }
    widest = int(np.diff(order.chunk_groups).max())
    return order.blocks, len(order.chunk_groups) - 1, widest, {k: np.ascontiguousarray(v) for k, v in found.items()}


def _above(places: np.ndarray) -> int:
    return -int(places.min(initial=0))


def _below(places: np.ndarray) -> int:
    return int(places.max(initial=0))


_EDGES: Any = tuple((operator.attrgetter(side), edge) for edge in (_above, _below) for side in ("rows", "columns"))


def _in_rows(source: Lying, part: Part) -> tuple[Lying, list[Part], int]:
    """Cut images whose pixels look at none but themselves into rows at will; also return the pixels of the last row."""
    total = source.shape[2] * source.shape[3]
    columns = min(_ROW, total)
    rows = -(-total // columns)

    def again(lying: Lying) -> Lying:
        step = lying.strides[3]
        return Lying((*lying.shape[:2], rows, columns), (*lying.strides[:2], columns * step, step))

    return again(source), [replace(part, target=again(part.target))], (total - 1) % columns + 1


def _equal_shares(images: int, fitting: int) -> int:
    """Return how many images a piece has, of which so many fit, so that threads get as many pieces each."""
    if images < threads():
        return 1
    return -(-images // (threads() * -(-images // (threads() * max(1, fitting)))))


def _one_run(lying: Lying) -> bool:
    """Whether rows follow each other without a gap."""
    return lying.strides[2] == lying.shape[3] * lying.strides[3] or lying.shape[2] == 1


def _check(failed: int) -> None:
    if failed:
        raise MemoryError(f"There is not enough memory for the planes of a layer in {threads()} threads.")
