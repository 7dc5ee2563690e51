"""Sums: a layer with kept weights only, in training: its output, the gradient of its input, and that of its weight.

All three are one loop over kept weights and shifted runs of pixels (`native/sums.h`). The gradient of the input is the sum over
the transposed weight, one for every phase of the stride; that of the weight has a product for every kept weight and no other.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from passes.kernels.compiler import threads
from passes.kernels.costs import Machine, cut
from passes.kernels.order import Order, order_of
from passes.kernels.planes import Part, Planes, in_rows, one_run, planes_of
from passes.kernels.windows import Kept, Lying

_INTEGERS, _TABLE = ctypes.c_int64, ctypes.c_void_p


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
        *((name, _INTEGERS) for name in ("together", "band", "tile")),
        *((name, _INTEGERS) for name in ("group", "blocks", "chunks", "widest", "by_chunk")),
        *((name, _TABLE) for name in ("chunk_groups", "starts", "offsets", "index", "place")),
        *((name, _INTEGERS) for name in ("weights", "elements", "shift")),
    )


class Prepared:
    """Sums over the planes of one source, ready to run.

    Attributes:
        records: for the native library, one for every part of the target.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        kept: Kept,
        source: Lying,
        parts: Sequence[Part],
        machine: Machine,
        tables: dict[Any, Order],
        *,
        gradient: bool = False,
    ) -> None:
        """Prepare sums.

        Args:
            library: the native one.
            kept: the weights.
            source: what they multiply.
            parts: what they write.
            machine: what they run on.
            tables: of these weights, made before, for sums that need the same; new ones are added.
            gradient: whether they are for the gradient of the weight, where gradients of outputs and, for each weight of a
                block, a vector stay in the next cache.
        """
        if len(parts) == 1 and parts[0].pointwise and one_run(source) and one_run(parts[0].target):
            source, parts, last = in_rows(source, parts[0])
        else:
            last = 0
        planes = planes_of(source, parts, machine, at_will=bool(last))
        self._tables: list[dict[str, np.ndarray]] = []
        self.records = (Sum * len(parts))()
        for number, (record, part) in enumerate(zip(self.records, parts, strict=True)):
            _lay_out(record, kept, source, part, planes, last)
            record.tile, *division = _divided(record, kept, part, planes, machine, gradient=gradient)
            key = (number, planes.lead, planes.pitch, planes.distance, *division, gradient)
            if key not in tables:
                tables[key] = _order(library, kept, part, planes, *division)
            order = tables[key]
            record.blocks, record.chunks, record.widest = order.blocks, len(order.chunk_groups) - 1, order.widest
            record.weights = len(order.index)
            own = {name: getattr(order, name) for name in ("chunk_groups", "starts", "offsets", "index", "place")}
            self._tables.append(own | {"shifts": np.array(part.phases, np.int32)})
            for name, table in self._tables[-1].items():
                setattr(record, name, table.ctypes.data)

    def run(self, library: ctypes.CDLL, source: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Write the sums over the kept weights of `weight` to the target."""
        given = (source.data_ptr(), target.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr())
        _check(library.sparsify_sum(self.records, len(self.records), *given, threads()))

    def gradient(self, library: ctypes.CDLL, source: Tensor, target: Tensor, weight: Tensor) -> None:
        """Write the gradient of the weight, of that of the target, to `weight`: 0 where nothing is kept."""
        given = (source.data_ptr(), target.data_ptr(), weight.data_ptr())
        _check(library.sparsify_sum_gradient(self.records, *given, threads()))


def _lay_out(record: Sum, kept: Kept, source: Lying, part: Part, planes: Planes, last: int) -> None:
    """Say in a record how source, target and planes lie; `last` is of pixels in the last row, 0 where it is full."""
    record.images, record.channels, record.source_rows, record.source_columns = source.shape
    record.source_image, record.source_channel, record.source_row, record.source_column = source.strides
    _, record.outputs, record.rows, record.columns = part.target.shape
    record.target_image, record.target_channel, record.target_row, record.target_column = part.target.strides
    record.last_columns, record.shift = last or record.columns, part.shift
    record.stride_rows, record.stride_columns = part.stride
    record.phases, record.elements = len(part.phases), kept.elements
    for name in ("above", "below", "lead", "pitch", "height", "distance", "together", "band"):
        setattr(record, name, getattr(planes, name))
    record.group = 1 if part.transposed else kept.group
    record.by_chunk = planes.pieces < threads()


def _divided(
    record: Sum, kept: Kept, part: Part, planes: Planes, machine: Machine, *, gradient: bool
) -> tuple[int, int, int, int]:
    """Return the vectors of a tile, the channels of a block, the most weights of a chunk, and the least chunks."""
    tile, block, _ = cut(
        machine,
        len(kept.places) * len(part.own) / len(part.taps) / record.group,  # about: places of a kernel keep as many
        record.outputs // record.group,
        record.channels,
        heights=[1 + planes.above + planes.below] * len(part.phases),
        flat=planes.run,
        pitch=planes.pitch,
        blocked=kept.groups == 1,
        training=True,
    )
    at_once = machine.tiles[record.group]  # vectors of a tile that are gone through together
    tile = max(tile // at_once * at_once, min(tile, at_once))
    chunks, most = 4 * threads() if record.by_chunk else 1, 1 << 15
    if gradient:
        chunks = max(chunks, record.outputs * planes.run * 16 // machine.next_cache)
        most = machine.next_cache // (256 * record.group) * -(-record.channels // block)
    return tile, block, most, chunks


def _order(library: ctypes.CDLL, kept: Kept, part: Part, planes: Planes, channels: int, most: int, chunks: int) -> Order:
    """Return the order of the weights of a part, over planes that lie like this."""
    shifts = [
        None if tap is None else tap.phase * planes.distance + planes.lead + tap.row * planes.pitch + tap.column
        for tap in part.taps
    ]
    return order_of(
        library,
        kept,
        shifts,
        len(part.phases) * planes.distance,
        channels=channels,
        chunk_weights=most,
        chunks=chunks,
        transposed=part.transposed,
    )


def _check(failed: int) -> None:
    if failed:
        raise MemoryError(f"There is not enough memory for the planes of a layer in {threads()} threads.")
