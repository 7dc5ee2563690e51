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
