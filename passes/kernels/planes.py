"""Planes: pieces of a tensor as the sums go through them, in the cache and with what is around pixels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from passes.kernels.compiler import threads
from passes.kernels.costs import Machine
from passes.kernels.windows import Lying

_ROW = 64  # pixels of a row, where they may be cut into rows at will


class Tap(NamedTuple):
    """What a place of the kernel finds: the phase of the stride, and rows and columns from the output's pixel within it."""

    phase: int
    row: int
    column: int


@dataclass(frozen=True)
class Part:
    """A part of a target, and the kept weights that add to it.

    Attributes:
        target: the shape of the part, and how it lies.
        shift: of its first number from the start of the target.
        transposed: whether the sums are of inputs.
        taps: of every place of the kernel, row by row; None for those that do not add to this part.
        phases: first row and column of the source that a phase has.
        stride: of the source.
        pointwise: whether a pixel only looks at the one at its place.
    """

    target: Lying
    shift: int
    transposed: bool
    taps: list[Tap | None]
    phases: list[tuple[int, int]]
    stride: tuple[int, int]
    pointwise: bool

    @property
    def own(self) -> list[Tap]:
        """The taps that add to this part."""
        return [tap for tap in self.taps if tap is not None]


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
    reach = [tap for part in parts for tap in part.own] or [Tap(0, 0, 0)]
    above, below = max(0, *(-tap.row for tap in reach)), max(0, *(tap.row for tap in reach))
    left, right = max(0, *(-tap.column for tap in reach)), max(0, *(tap.column for tap in reach))
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
