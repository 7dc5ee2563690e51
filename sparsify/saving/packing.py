"""Packing: a masked tensor as its kept values and one bit per element."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(tensor: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the kept values of a tensor, in the order of `flatten()`, and its mask as bits, 8 to a byte, the first lowest."""
    flat, where = tensor.flatten().view(_INTEGERS[tensor.element_size()]).numpy(), mask.flatten().numpy()
    bits = np.packbits(where, bitorder="little")
    kept = np.compress(where, flat)  # twice as fast as flat[where]
    return torch.from_numpy(kept).view(tensor.dtype), torch.from_numpy(bits)


def unpack(values: Tensor, bits: Tensor, shape: Any) -> tuple[Tensor, Tensor]:
    """Return the dense tensor and the mask that `pack` was given.

    Raises:
        ValueError: values, bits and shape contradict each other.
    """
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"{shape!r} is not a shape")
    size = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.dim() != 1 or values.dim() != 1 or bits.numel() != -(-size // 8):
        raise ValueError(f"its mask has {bits.numel()} bytes for {size} weights")
    unpacked = np.unpackbits(bits.numpy(), bitorder="little")
    if unpacked[size:].any() or int(unpacked[:size].sum()) != values.numel():
        raise ValueError(f"its mask keeps {int(unpacked.sum())} weights, and {values.numel()} values are there")
    mask = torch.from_numpy(unpacked[:size].astype(bool))
    dense = torch.zeros(size, dtype=_INTEGERS[values.element_size()])
    dense.numpy()[np.flatnonzero(mask.numpy())] = values.view(dense.dtype).numpy()
    return dense.view(values.dtype).view(shape), mask.view(shape)
