"""Arrange: a sparse weight as the kernels take it."""

import numpy as np

from passes.kernels.windows import Kept
from passes.lowering.program import Weight


def mask_of(weight: Weight, bits: np.ndarray) -> np.ndarray:
    """Return which elements of a weight are kept: (outputs, elements) bool."""
    count = int(np.prod(weight.shape))
    if weight.count == count:
        return np.ones((weight.shape[0], count // weight.shape[0]), bool)
    packed = bits[weight.bits : weight.bits + -(-count // 8)]
    return np.unpackbits(packed, count=count).view(bool).reshape(weight.shape[0], -1)


def patterns_of(weight: Weight, values: np.ndarray, mask: np.ndarray, group: int, groups: int) -> tuple[Kept, np.ndarray]:
    """Return the kept weights of a layer, for outputs in groups that share what any of them keeps.

    Args:
        weight: of the layer.
        values: the program's numbers.
        mask: (outputs, elements) bool.
        group: how many outputs share a pattern.
        groups: convolution groups.

    Returns:
        The patterns, as if each group of outputs were one, and the values of their outputs: (kept, group) float32.
    """
    own, shape = values[weight.start : weight.start + weight.count], (weight.shape[0] // group, *weight.shape[1:])
    if group == 1:
        return Kept.of(mask.reshape(shape), groups, last=False, group=1), own[:, None]
    dense = np.zeros(mask.shape, np.float32)
    dense[mask] = own
    shared = np.asarray(mask.reshape(-1, group, mask.shape[1]).any(1))
    kept = Kept.of(shared.reshape(shape), groups, last=False, group=1)
    outputs, rest = np.divmod(kept.places, mask.shape[1])
    return kept, dense.reshape(-1, group, mask.shape[1])[outputs, :, rest]
