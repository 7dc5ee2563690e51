"""History: what the topology of a run was at every step, and the state that a checkpoint holds of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Topology:
    """How many weights each masked parameter keeps from the end of `step` on.

    Example:
        >>> from sparsify import sparsify
        >>> model = sparsify(torch.nn.Sequential(torch.nn.Linear(10, 10)), density=0.5)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model.updater.attach(optimizer, total_steps=1000)
        >>> [(entry.step, entry.nonzeros) for entry in model.updater.history]
        [(0, {'0.weight': 50})]
    """

    step: int  # optimizer steps, counted from 1; 0 is the start of training
    nonzeros: dict[str, int]
    densities: dict[str, float]  # kept fractions, in (0, 1]; `cost_ledger` has the FLOPs


class History:
    """The counts over time of some weights, oldest first; an entry is (step, counts in the order of the names)."""

    def __init__(self, names: Iterable[str], entries: Iterable[tuple[int, tuple[int, ...]]] = ()) -> None:
        self.names = tuple(names)
        self.entries = list(entries)

    def record(self, step: int, nonzeros: Mapping[str, int]) -> None:
        """Enter counts; at one step those of the last that does. Clocks of several optimizers may differ: time goes on."""
        step = max([step, *(entry[0] for entry in self.entries[-1:])])
        if self.entries and self.entries[-1][0] == step:
            self.entries.pop()
        counts = tuple(nonzeros.get(name, 0) for name in self.names)
        if self.entries and self.entries[-1][1] == counts:
            counts = self.entries[-1][1]  # one object, so that a long history stays small
        self.entries.append((step, counts))

    def topologies(self, sizes: Mapping[str, int]) -> list[Topology]:
        """Return the entries as people read them, with densities of the weights that are given a size."""
        found = []
        for step, counts in self.entries:
            nonzeros = dict(zip(self.names, counts, strict=True))
            found.append(Topology(step, nonzeros, {name: nonzeros[name] / size for name, size in sizes.items()}))
        return found


_VERSION = 2  # of the layout
_ROOM = {False: 1024, True: 256}  # entries of the history that there is room for anyway, by whether counts vary
_CLOCKS = 4  # likewise: as many optimizers


@dataclass
class State:
    """What the updater keeps on the host, and its form in a `state_dict`: one CPU tensor of integers.

    Layout: version, seed, total_steps, a digest of the schedule, skipped updates, the numbers of letters in the method's name,
    of clocks, of counts and of history entries; then the letters, the clocks, the nonzeros, the targets, and for every entry
    of the history its step and its counts. Counts are stored where they differ from those of the entry before: each entry has
    the number of differences, then (index, count) pairs. Zeros at the end leave room for the updates that are to come, so that
    the size stays the same throughout a run, and before `attach` for most: torch.distributed.checkpoint loads into tensors of
    the size that was saved, and averages are made before and copy entry by entry.
    """

    method: str = ""
    seed: int = 0
    total_steps: int = 0
    schedule: int = 0  # zlib.crc32 of the method's schedule
    skipped: int = 0
    clocks: list[int] = field(default_factory=lambda: [0])
    nonzeros: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    history: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)

    def encode(self, coming: int = 0, counts_vary: bool = False) -> Tensor:
        """Return the state as a tensor, with room for so many coming updates."""
        letters = self.method.encode()
        numbers = [_VERSION, self.seed, self.total_steps, self.schedule, self.skipped]
        numbers += [len(letters), len(self.clocks), len(self.nonzeros), len(self.history), *letters]
        numbers += [*self.clocks, *self.nonzeros, *self.targets]
        pairs = 2 * len(self.nonzeros)
        entries = max(len(self.history) + coming, _ROOM[counts_vary])
        size = len(numbers) + 2 + pairs + (entries - 1) * (2 + pairs * counts_vary) - len(self.clocks) + _CLOCKS
        before = (-1,) * len(self.nonzeros)
        for step, counts in self.history:
            changed = [(i, n) for i, n in enumerate(counts) if n != before[i]] if counts is not before else []
            numbers += [step, len(changed), *(n for pair in changed for n in pair)]
            before = counts
        return F.pad(torch.tensor(numbers, dtype=torch.int64), (0, max(0, size - len(numbers))))

    @staticmethod
    def decode(tensor: Tensor) -> "State":
        """Read what `encode` wrote.

        Raises:
            ValueError: the tensor is something else.
        """
        numbers = iter(tensor.tolist())
        try:
            if next(numbers) != _VERSION:
                raise IndexError
            seed, total, schedule, skipped, letters, clocks, counts, entries = (next(numbers) for _ in range(8))
            method = bytes(next(numbers) for _ in range(letters)).decode()
            lists = ([next(numbers) for _ in range(n)] for n in (clocks, counts, counts))
            state = State(method, seed, total, schedule, skipped, *lists)
            before = (-1,) * counts
            for _ in range(entries):
                step, changes = next(numbers), next(numbers)
                if changes:
                    row = list(before)
                    for _ in range(changes):
                        index, count = next(numbers), next(numbers)
                        row[index] = count
                    before = tuple(row)
                state.history.append((step, before))
        except (StopIteration, RuntimeError, IndexError, ValueError) as error:
            raise ValueError("The state_dict's entry updater._extra_state is damaged or of another version.") from error
        return state
