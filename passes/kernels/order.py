"""Order: in which order the kernels go through kept weights."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from passes.kernels.compiler import threads
from passes.kernels.windows import Kept

_INTEGERS, _TABLE = ctypes.c_int64, ctypes.c_void_p


class _Order(ctypes.Structure):
    """An order; the fields, and what they mean, are those of `native/order.h`."""

    _fields_ = (
        ("weights", _INTEGERS),
        *((name, _TABLE) for name in ("places", "index")),
        *((name, _INTEGERS) for name in ("outputs", "inputs", "taps", "last", "groups", "transposed", "group")),
        ("shifts", _TABLE),
        *((name, _INTEGERS) for name in ("distance", "channels", "least")),
        ("most", ctypes.c_double),
        *((name, _INTEGERS) for name in ("blocks", "chunks", "widest", "found")),
        *((name, _TABLE) for name in ("chunk_groups", "starts", "offsets", "own", "place")),
    )


@dataclass(frozen=True)
class Order:
    """The order of a layer's work: `Step` and `Sum` in `native/` say what the tables are.

    Attributes:
        blocks: of input channels.
        widest: groups of outputs that the largest chunk has.
        chunk_groups, starts, offsets, index, place: the tables, int32.
    """

    blocks: int
    widest: int
    chunk_groups: np.ndarray
    starts: np.ndarray
    offsets: np.ndarray
    index: np.ndarray
    place: np.ndarray


def order_of(
    library: ctypes.CDLL,
    kept: Kept,
    shifts: Sequence[int | None],
    distance: int,
    *,
    channels: int,
    chunk_weights: float,
    chunks: int,
    transposed: bool = False,
) -> Order:
    """Return an order of kept weights.

    Args:
        library: the native one, which sorts by counting.
        kept: the weights.
        shifts: by the place of a weight in its kernel, from a channel to what the weight multiplies; None for those that are no
            part of the sums.
        distance: from a channel to the next.
        channels: input channels of a block, whose pixels stay in the nearest cache.
        chunk_weights: the most weights of a chunk of outputs, which stay in the next cache.
        chunks: at least so many chunks, with about as many weights each.
        transposed: whether a sum goes to each input, over outputs, instead of the other way.
    """
    outputs, inputs, rows, columns = kept.shape
    sums, summed = (inputs * kept.groups, outputs) if transposed else (outputs, inputs * kept.groups)
    group = 1 if transposed else kept.group
    groups, blocks, count = sums // group, -(-summed // channels), len(kept.places)
    tables = {"chunk_groups": np.empty(groups + 1, np.int32), "starts": np.empty(groups * blocks + 1, np.int32)}
    tables |= {"offsets": np.empty(count // group, np.int32)}
    tables |= {name: np.empty(count, np.int32) for name in ("own", "place")}
    steps = np.array([-1 if shift is None else shift for shift in shifts], np.int32)
    order = _Order(
        weights=count,
        places=kept.places.ctypes.data,
        index=kept.index.ctypes.data,
        outputs=outputs,
        inputs=inputs,
        taps=rows * columns,
        last=kept.last,
        groups=kept.groups,
        transposed=transposed,
        group=group,
        shifts=steps.ctypes.data,
        distance=distance,
        channels=channels,
        least=chunks,
        most=chunk_weights,
        blocks=blocks,
        **{name: table.ctypes.data for name, table in tables.items()},
    )
    library.sparsify_order(ctypes.byref(order), threads())

    def used(name: str, count: int) -> np.ndarray:
        return tables[name] if count == len(tables[name]) else tables[name][:count].copy()

    return Order(
        blocks=blocks,
        widest=order.widest,
        chunk_groups=used("chunk_groups", order.chunks + 1),
        starts=tables["starts"],
        offsets=used("offsets", order.found // group),
        index=used("own", order.found) if order.found < count else kept.index,  # one for all sums of a layer
        place=used("place", order.found),
    )
