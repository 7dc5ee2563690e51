"""Memory: where planes lie; what is no longer needed makes room for what comes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from passes.lowering.layout import Grid


@dataclass
class _Buffer:
    """Numbers that belong to one step's result: how many, the steps that use them first and last, and where they are."""

    floats: int
    first: int
    last: int
    start: int = -1


@dataclass(frozen=True)
class Planes:
    """Planes of some buffers: of each plane its buffer, and where pixel (0, 0) is from the buffer's start."""

    buffers: tuple[_Buffer, ...]
    owner: np.ndarray  # (planes,) index into buffers
    place: np.ndarray  # (planes,)

    def offsets(self) -> np.ndarray:
        """Return where pixel (0, 0) of every plane is, once buffers have been placed."""
        starts = np.array([buffer.start for buffer in self.buffers])
        return np.ascontiguousarray(starts[self.owner] + self.place, dtype=np.int32)

    def part(self, start: int, stop: int | None, step: int = 1) -> "Planes":
        """Return some of the planes."""
        return Planes(self.buffers, self.owner[start:stop:step], self.place[start:stop:step])

    def repeated(self, times: int) -> "Planes":
        """Return every plane so many times."""
        return Planes(self.buffers, self.owner.repeat(times), self.place.repeat(times))

    def shifted(self, by: np.ndarray) -> "Planes":
        """Return planes that begin elsewhere."""
        return Planes(self.buffers, self.owner, self.place + by)

    @staticmethod
    def joined(parts: Sequence["Planes"]) -> "Planes":
        """Return planes behind each other."""
        buffers = tuple(buffer for part in parts for buffer in part.buffers)
        shifts = np.cumsum([0, *(len(part.buffers) for part in parts[:-1])])
        owner = np.concatenate([part.owner + shift for part, shift in zip(parts, shifts, strict=True)])
        return Planes(buffers, owner, np.concatenate([part.place for part in parts]))


class Memory:
    """Buffers, and the steps in which they are used."""

    def __init__(self) -> None:
        """Begin before the first step."""
        self._buffers: list[_Buffer] = []
        self._step = 0

    def new(self, channels: int, lying: Grid) -> Planes:
        """Return new planes, which the next step writes."""
        # A line at the start, so that single numbers of different buffers share none.
        buffer = _Buffer(-(-channels * lying.distance // 16) * 16, self._step, self._step)
        self._buffers.append(buffer)
        place = np.arange(channels, dtype=np.int64) * lying.distance + lying.lead
        return Planes((buffer,), np.zeros(channels, np.int64), place)

    def use(self, planes: Planes) -> None:
        """Say that the next step reads or writes planes."""
        for buffer in planes.buffers:
            buffer.last = max(buffer.last, self._step)

    def next_step(self) -> None:
        """Say that a step is complete."""
        self._step += 1

    def place(self) -> int:
        """Give every buffer a place where no other one is while it is used; return how many numbers they take together."""
        total = 0
        placed: list[_Buffer] = []
        for buffer in sorted(self._buffers, key=lambda b: b.first):
            others = sorted((b for b in placed if b.last >= buffer.first), key=lambda b: b.start)
            start = 0
            for other in others:
                if start + buffer.floats <= other.start:
                    break
                start = max(start, other.start + other.floats)
            buffer.start = start
            placed.append(buffer)
            total = max(total, start + buffer.floats)
        return total
