"""Random masks and numbers that depend on a seed and names alone: equal on every rank, device and resume."""

import zlib

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 19  # weights at a time: their random bits stay in the cache


def random_mask(shape: tuple[int, ...], nonzeros: int, seed: int, name: str) -> Tensor:
    """Draw a mask uniformly among all with an exact count.

    It depends on its arguments only: every rank, device and numpy version draws the same, and no global generator moves.
    8 random bits per weight give somewhat less than the count; setting random positions then makes it exact, and by
    symmetry every mask stays equally likely.

    Args:
        shape: of the weight.
        nonzeros: True elements, from 1 to the number of weights.
        seed: any integer.
        name: the weight's name, so that weights of one shape get different masks.

    Returns:
        bool on the CPU, contiguous.

    Example:
        >>> mask = random_mask((64, 64), 410, seed=0, name="fc.weight")
        >>> int(mask.sum()), torch.equal(mask, random_mask((64, 64), 410, seed=0, name="fc.weight"))
        (410, True)
    """
    size = torch.Size(shape).numel()
    if nonzeros == size:
        return torch.ones(shape, dtype=torch.bool)
    bits = _random_bits(seed, name)
    mask = np.empty(size, dtype=bool)
    for start in range(0, size, _CHUNK):
        part = mask[start : start + _CHUNK]
        np.less(bits.random_raw(-(-part.size // 8)).view(np.uint8)[: part.size], nonzeros * 256 // size, out=part)
    while surplus := int(np.count_nonzero(mask)) - nonzeros:
        wrong = surplus > 0  # the value that too many positions have
        share = (nonzeros if wrong else size - nonzeros) / size
        drawn = bits.random_raw(int(abs(surplus) / share) + 16) % size  # one drawn twice leaves work for another round
        mask[drawn[mask[drawn] == wrong][: abs(surplus)]] = not wrong
    return torch.from_numpy(mask).view(shape)


def uniform_numbers(count: int, seed: int, name: str, step: int = 0) -> np.ndarray:
    """Draw float32 numbers in [0, 1) that depend on the arguments only; no global generator moves.

    Example:
        >>> bool((uniform_numbers(3, 0, "fc.weight") == uniform_numbers(3, 0, "fc.weight")).all())
        True
    """
    bits = _random_bits(seed, name, step).random_raw(-(-count // 2)).view(np.uint32)[:count]
    return (bits >> 8).astype(np.float32) * np.float32(2**-24)


def _random_bits(seed: int, *key: str | int) -> np.random.SFC64:
    numbers = [zlib.crc32(k.encode()) if isinstance(k, str) else k for k in key]
    return np.random.SFC64(np.random.SeedSequence([seed % 2**63, *numbers]))
