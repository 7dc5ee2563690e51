"""Planes: pieces of a tensor as the sums go through them, in the cache and with what is around pixels."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from passes.kernels.compiler import threads
from passes.kernels.costs import Machine
from passes.kernels.windows import Lying

_ROW = 64  # pixels of a row, where they may be cut into rows at will


@dataclass(frozen=True)
class Part:
    """A part of a target, and the kept weights that add to it.

    Attributes:
        target: the shape of the part, and how it lies.
        shift: of its first number from the start of the target.
        outputs, inputs: (patterns,) int, the group of outputs that share them and what they multiply, by groups ascending.
        order: (patterns, group) int, which of all kept weights they are.
        index: (all kept) int, of these in the dense weight, ascending.
        planes: (patterns,) the phase of the stride of the source.
        rows, columns: (patterns,) from the output's pixel to the source's within the phase.
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


@dataclass(frozen=True)
class Planes:
    """How the planes of a source lie, and what of it they hold at a time: the fields of `Sum`.

    Attributes:
        run: positions of a piece.
        pieces: how many there are.
    """

    above: int
    below: int
    lead: int
    pitch: int
    height: int
    distance: int
    together: int
    band: int
    run: int
    pieces: int


def planes_of(source: Lying, parts: Sequence[Part], machine: Machine, *, at_will: bool) -> Planes:
    """Return the planes for parts of a target; `at_will` if rows are."""
    images, channels, source_rows, source_columns = source.shape
    rows, columns = (max(part.target.shape[side] for part in parts) for side in (2, 3))
    phases, stride = parts[0].phases, parts[0].stride
    # Planes: no weight finds anything but 0 outside of the source.
    above, left, below, right = (max(edge(get(part)) for part in parts) for get, edge in _EDGES)
    high, wide = -(-source_rows // stride[0]), -(-source_columns // stride[1])
    pitch = max(wide + left, columns + right)
    height = max(high + above, rows + below)
    line = channels * len(phases) * pitch * 4
    least = machine.tiles[1] * machine.lanes  # positions, so that registers are full
    fitting = max(machine.next_cache // 2 // line, -(-least // pitch))  # rows
    together = _equal_shares(images, fitting // height)
    band = rows if together > 1 or fitting >= height else min(rows, max(1, fitting - above - below))
    height = band + below if band < rows else height
    if at_will and images == 1:  # the same planes and tables for any number of pixels
        height = fitting
    lead = -(-(above * pitch + left) // 16) * 16
    floats = lead + (together * height + below) * pitch + right + 2 * 16
    distance = (-(-floats // 16) | 1) * 16
    run = height * pitch if at_will and images == 1 else ((together - 1) * height + band - 1) * pitch + columns
    pieces = -(-images // together) * -(-rows // band)
    return Planes(above, below, lead, pitch, height, distance, together, band, run, pieces)


def _above(places: np.ndarray) -> int:
    return -int(places.min(initial=0))


def _below(places: np.ndarray) -> int:
    return int(places.max(initial=0))


_EDGES: Any = tuple((operator.attrgetter(side), edge) for edge in (_above, _below) for side in ("rows", "columns"))


def in_rows(source: Lying, part: Part) -> tuple[Lying, list[Part], int]:
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


def one_run(lying: Lying) -> bool:
    """Whether rows follow each other without a gap."""
    return lying.strides[2] == lying.shape[3] * lying.strides[3] or lying.shape[2] == 1
