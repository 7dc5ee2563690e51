"""Costs: how a convolution is cut into pieces, and which kernel is the fastest, from a model of the machine."""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from passes.kernels.compiler import threads
from passes.kernels.windows import GROUPS


@dataclass(frozen=True)
class Pace:
    """What a processor takes, in cycles, fitted to layers of ResNet-50.

    Attributes:
        visit: to begin and end the sums of an output over a block of channels.
        sums: of each vector of them.
        turn: to take up a weight.
        aligned: to multiply a vector and add it to a sum, by how many outputs share a pattern, where vectors begin at lines of
            the cache: of kernels of one pixel.
        shifted: the same where they begin anywhere.
        near: the share of the nearest cache that a block may take.
        miss: more for a vector that comes from the next cache, if few of a block's are looked at.
        swept: more for it if all of a block's are: the more of it every output looks at, the less is still there for the next.
        far: more for a vector that comes from behind the next cache.
    """

    visit: float
    sums: float
    turn: float
    aligned: dict[int, float]
    shifted: dict[int, float]
    near: float
    miss: float
    swept: float
    far: float


_WIDE = Pace(13, 1.4, 0.9, {1: 0.67, 2: 0.48, 4: 0.5}, {1: 0.98, 2: 0.56, 4: 0.5}, 0.7, 0.6, 0, 0.5)  # a Zen 5
_NARROW = Pace(9, 0.7, 0.4, {1: 0.6, 2: 0.47, 4: 0.42}, {1: 0.62, 2: 0.53, 4: 0.36}, 0.85, 0.35, 0.3, 0.4)  # a Zen 3
# In training planes hold a batch: more comes from far away.
_WIDE_TRAINING = replace(_WIDE, miss=1.2, far=3)
_NARROW_TRAINING = replace(_NARROW, visit=10, sums=0.6, turn=1, near=0.7, miss=1.2, swept=0.9, far=3)


@dataclass(frozen=True)
class Machine:
    """What the kernels run on.

    Attributes:
        lanes: numbers in a vector.
        tiles: how many vectors of pixels a tile has at most, by how many outputs share a pattern.
        cache: bytes of the nearest cache.
        next_cache: bytes of the one behind it.
    """

    lanes: int
    tiles: dict[int, int]
    cache: int
    next_cache: int = 1 << 20


def this_machine(library: ctypes.CDLL) -> Machine:
    """Return the machine at hand, for which a native library was compiled."""
    tiles = {group: library.sparsify_tile(group) for group in GROUPS}
    first, second = library.sparsify_cache(1), library.sparsify_cache(2)
    return Machine(library.sparsify_lanes(), tiles, first or 32768, min(second or 1 << 20, 1 << 21))


@dataclass(frozen=True)
class Work:
    """How a convolution is cut.

    Attributes:
        group: outputs that share a pattern.
        vectors: of pixels in a tile.
        channels: input channels of a block.
        chunk_weights: the most weights of a chunk.
        chunks: at least so many.
        cycles: about how many one core takes.
    """

    group: int
    vectors: int
    channels: int
    chunk_weights: float
    chunks: int
    cycles: float


def choose(
    machine: Machine,
    mask: np.ndarray,
    shape: tuple[int, ...],
    heights: Sequence[int],
    flat: int,
    pitch: int,
    groups: int,
    images: int,
    *,
    single: bool,
) -> Work:
    """Return how a convolution is cut.

    Args:
        machine: what it runs on.
        mask: its kept weights: (outputs, elements).
        shape: of its weight.
        heights: of each plane of a channel, how many rows a row of outputs looks at.
        flat: numbers from the first pixel to the last.
        pitch: numbers from one row to the next.
        groups: convolution groups.
        images: how many take turns.
        single: whether planes are one pixel.
    """
    if single:
        return Work(1, 1, 1 << 30, np.inf, _chunks(1), 0.7 * float(mask.sum()))
    found = []
    for group in GROUPS:
        if shape[0] // groups % group:
            continue
        # Outputs that share a pattern multiply what any of them keeps.
        patterns = mask if group == 1 else mask.reshape(-1, group, mask.shape[1]).any(1)
        kept = float(np.count_nonzero(patterns))
        vectors, channels, cycles = cut(
            machine,
            kept,
            shape[0] // group,
            shape[1],
            heights=heights,
            flat=flat,
            pitch=pitch,
            blocked=groups == 1,
            group=group,
            shifted=math.prod(shape[2:]) > 1,
        )
        tiles = -(-flat // (machine.lanes * vectors))
        chunk = _chunk(machine, kept, tiles * images, 4 * vectors * machine.lanes * shape[1] * groups)
        found.append(Work(group, vectors, channels, chunk, _chunks(tiles), cycles))
    return min(found, key=lambda work: work.cycles)


def _chunk(machine: Machine, kept: float, tiles: int, pixels: int) -> float:
    """Return the most weights of a chunk of outputs.

    Weights of a chunk stay in the next cache while a thread's tiles take turns, and every chunk reads the pixels of every tile
    again: what comes from far away less often decides.

    Args:
        machine: what it runs on.
        kept: weights, of as many outputs as share a pattern.
        tiles: of all images that take turns.
        pixels: bytes of a tile that all weights look at.
    """
    turns, most = -(-tiles // threads()), 16384
    again = (kept / most - 1) * turns * pixels if pixels > machine.next_cache / 2 else 0.0
    return np.inf if again >= (turns - 1) * 8 * kept else most


def cut(
    machine: Machine,
    kept: float,
    outputs: float,
    channels: int,
    *,
    heights: Sequence[int],
    flat: int,
    pitch: int,
    blocked: bool = True,
    group: int = 1,
    shifted: bool = True,
    training: bool = False,
) -> tuple[int, int, float]:
    """Return how a sum over kept weights is cut: vectors of pixels in a tile, input channels of a block, and about the cycles.

    Args:
        machine: what it runs on.
        kept: weights, of as many outputs as share a pattern.
        outputs: how many, by patterns.
        channels: that each of them looks at.
        heights: of each plane of a channel, how many rows a row of outputs looks at.
        flat: numbers from the first pixel to the last.
        pitch: numbers from one row to the next.
        blocked: whether there may be several blocks.
        group: outputs that share a pattern.
        shifted: whether vectors of pixels begin anywhere in lines of the cache.
        training: whether a batch is gone through together, as in training.
    """
    total, wide = -(-flat // machine.lanes), machine.lanes == 16
    pace = (_WIDE_TRAINING if wide else _NARROW_TRAINING) if training else _WIDE if wide else _NARROW
    swept = min(1.0, kept / max(1.0, outputs * channels))
    load = group * (pace.shifted if shifted else pace.aligned)[group]
    missed = pace.miss + pace.swept * swept
    best, found, most = np.inf, (1, 1), min(total, machine.tiles[group])
    for vectors in range(most, min(4, most) - 1, -1):
        run, tiles, uneven = vectors * machine.lanes, -(-total // vectors), _uneven(total, vectors)
        reach = 4 * channels * sum(min(height * (run + 8), run + (height - 1) * pitch + 8) for height in heights)
        for blocks in _blocks(channels) if blocked else (1,):
            near = min(1.0, pace.near * machine.cache * blocks / reach)
            behind = max(0.0, 1 - machine.next_cache * blocks / (2 * reach))
            per_vector = load + missed * (1 - near) + pace.far * behind
            cost = blocks * outputs * (tiles * pace.visit + total * pace.sums * group)
            cost = uneven * (cost + kept * (tiles * pace.turn + total * per_vector))
            if cost < best:
                best, found = cost, (vectors, blocks)
    vectors, blocks = found
    return vectors, -(-channels // blocks) if blocked else 1 << 30, float(best)


def _uneven(total: int, vectors: int) -> float:
    """Return how much longer the thread with the most vectors takes than if all had as many."""
    tiles, team = -(-total // vectors), threads()
    chunks = _chunks(tiles)
    return -(-tiles * chunks // team) * vectors * team / (chunks * total)


def _chunks(tiles: int) -> int:
    """Return the least chunks of outputs for so many tiles: several a thread, so that a late one leaves some to others."""
    return -(-4 * threads() // tiles) if threads() > 1 else 1


def torch_cycles(machine: Machine, weights: int, pixels: int, groups: int, outputs: float) -> float:
    """Return about how many cycles torch takes on one core for a dense layer of so many weights, on so many pixels."""
    share = 1.0 if groups == 1 else 0.25  # of two vectors a cycle, in cycles of which a kernel's load takes half a one
    return CALL / 2 + weights * max(pixels / (2 * machine.lanes * share), 0.5) + outputs / 4


CALL = 60_000  # cycles that an operator call costs; one of torch's own costs half
COPIED = 0.5  # cycles for a number that is copied or combined with another


def _blocks(channels: int) -> list[int]:
    return [n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64) if n == 1 or channels // n >= 8]
