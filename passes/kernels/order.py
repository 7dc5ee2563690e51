"""Order: in which order the kernels go through kept weights."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Order:
    """The order of a layer's work: `Step` and `Sum` in `native/` say what the tables are."""

    blocks: int
    chunk_groups: np.ndarray
    starts: np.ndarray
    order: np.ndarray  # of the kept weights


def order_of(outputs: np.ndarray, inputs: np.ndarray, groups: int, channels: int, chunk_weights: float, chunks: int) -> Order:
    """Return an order of kept weights.

    Args:
        outputs: (kept,) int, the group of outputs of each weight, ascending.
        inputs: (kept,) int, its input channel.
        groups: how many groups of outputs there are.
        channels: input channels of a block, whose pixels stay in the nearest cache.
        chunk_weights: the most weights of a chunk of outputs, which stay in the next cache.
        chunks: at least so many chunks, with about as many weights each.
    """
    per_group = np.bincount(outputs, minlength=groups) + 1.0
    work = np.concatenate([[0.0], np.cumsum(per_group)])
    count = min(groups, max(chunks, int(-(-work[-1] // chunk_weights))))
    chunk_groups = np.unique(np.searchsorted(work, np.linspace(0, work[-1], count + 1)[1:-1]))
    chunk_groups = np.unique(np.concatenate([[0], chunk_groups, [groups]])).astype(np.int32)
    block = inputs // channels
    blocks = int(block.max(initial=0)) + 1
    sizes = np.diff(chunk_groups)
    chunk = np.repeat(np.arange(len(sizes)), np.diff(np.searchsorted(outputs, chunk_groups)))
    cell = chunk_groups[chunk].astype(np.int64) * blocks + block * sizes[chunk] + outputs - chunk_groups[chunk]
    # Outputs ascend already, so that chunks and blocks are all there is to sort by.
    order = by_size(chunk * blocks + block) if blocks > 1 else np.arange(len(cell))
    starts = np.concatenate([[0], np.cumsum(np.bincount(cell, minlength=groups * blocks))]).astype(np.int32)
    return Order(blocks, chunk_groups, starts, order)


def by_size(keys: np.ndarray) -> np.ndarray:
    """Return the stable order of numbers from 0 on; where they are small, numpy sorts them digit by digit."""
    small = len(keys) and keys.max() < 1 << 16
    return np.argsort(keys.astype(np.uint16) if small else keys, kind="stable")


def inverse(order: np.ndarray, count: int) -> np.ndarray:
    """Return for each of so many things where it comes in an order of some of them, and -1 for those that do not."""
    places = np.full(count, -1, np.int32)
    places[order] = np.arange(len(order), dtype=np.int32)
    return places
