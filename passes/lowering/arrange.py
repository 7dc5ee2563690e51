"""Arrange: a sparse weight in the order in which the kernels go through it."""

from dataclasses import dataclass

import numpy as np

from passes.lowering.program import Weight


@dataclass(frozen=True)
class Kept:
    """The kept weights of a layer, output by output; `group` outputs that follow each other share a pattern.

    Attributes:
        group: how many outputs share a pattern; what one of them keeps counts for all.
        outputs: (kept,) int, the group of each.
        inputs, taps: (kept,) int, the input channel within its convolution group and the place in the kernel of each.
        values: (kept, group) float32.
    """

    group: int
    outputs: np.ndarray
    inputs: np.ndarray
    taps: np.ndarray
    values: np.ndarray


def mask_of(weight: Weight, bits: np.ndarray) -> np.ndarray:
    """Return which elements of a weight are kept: (outputs, elements) bool."""
    count = int(np.prod(weight.shape))
    if weight.count == count:
        return np.ones((weight.shape[0], count // weight.shape[0]), bool)
    packed = bits[weight.bits : weight.bits + -(-count // 8)]
    return np.unpackbits(packed, count=count).view(bool).reshape(weight.shape[0], -1)


def kept_weights(weight: Weight, values: np.ndarray, mask: np.ndarray, group: int) -> Kept:
    """Return the kept weights of a layer, for outputs in groups that share what any of them keeps."""
    taps = int(np.prod(weight.shape[2:]))
    own = values[weight.start : weight.start + weight.count]
    if group == 1:
        outputs, rest = np.nonzero(mask)
        found = own[:, None]
    else:
        outputs, rest = np.nonzero(mask.reshape(-1, group, mask.shape[1]).any(1))
        dense = np.zeros(mask.shape, np.float32)
        dense[mask] = own
        found = dense.reshape(-1, group, mask.shape[1])[outputs, :, rest]
    return Kept(group, outputs, rest // taps, rest % taps, np.ascontiguousarray(found))


@dataclass(frozen=True)
class Order:
    """The order of a convolution's work: `Step` in native/steps.h says what the tables are."""

    blocks: int
    chunk_groups: np.ndarray
    starts: np.ndarray
    order: np.ndarray  # of the kept weights


def order_of(kept: Kept, groups: int, channels: int, chunk_weights: float, chunks: int) -> Order:
    """Return an order of kept weights.

    Args:
        kept: the weights.
        groups: how many groups of outputs there are.
        channels: input channels of a block, whose pixels stay in the nearest cache.
        chunk_weights: the most weights of a chunk of outputs, which stay in the next cache.
        chunks: at least so many chunks, with about as many weights each.
    """
    per_group = np.bincount(kept.outputs, minlength=groups) + 1.0
    work = np.concatenate([[0.0], np.cumsum(per_group)])
    count = min(groups, max(chunks, int(-(-work[-1] // chunk_weights))))
    chunk_groups = np.unique(np.searchsorted(work, np.linspace(0, work[-1], count + 1)[1:-1]))
    chunk_groups = np.unique(np.concatenate([[0], chunk_groups, [groups]])).astype(np.int32)
    block = kept.inputs // channels
    blocks = int(block.max(initial=0)) + 1
    chunk = np.searchsorted(chunk_groups, kept.outputs, side="right") - 1
    sizes = np.diff(chunk_groups)
    cell = chunk_groups[chunk].astype(np.int64) * blocks + block * sizes[chunk] + kept.outputs - chunk_groups[chunk]
    order = np.argsort(cell, kind="stable") if blocks > 1 else np.arange(len(cell))
    starts = np.concatenate([[0], np.cumsum(np.bincount(cell, minlength=groups * blocks))]).astype(np.int32)
    return Order(blocks, chunk_groups, starts, order)
