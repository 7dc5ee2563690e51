"""State: what the topology of a run was at every step, and what a checkpoint holds of it."""

import json
from collections.abc import Iterable, Iterator, Mapping
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
        """Enter counts, in place of others at the same step. Clocks of several optimizers may differ; time only goes on."""
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


_ROOM = {False: 1024, True: 256}  # entries of the history that there is room for anyway, by whether counts vary
_NUMBER, _PAIR, _FIXED = (16, 30, 512)  # bytes that JSON takes at most for a number, for a pair, and for what there is once


@dataclass
class State:
    """What the updater keeps on the host, and its form in a `state_dict`: JSON, as one CPU tensor of bytes.

    An entry of the history is [step, [[index, count], ...]] with the counts that differ from those of the entry before. Zeros
    at the end leave room for the updates that are to come, so that the size stays the same throughout a run, and before
    `attach` for most: torch.distributed.checkpoint loads into tensors of the size that was saved, and averages are made before
    and copy entry by entry.
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
        """Return the state as a uint8 tensor, with room for so many coming updates."""
        history, before = [], (-1,) * len(self.nonzeros)
        for step, counts in self.history:
            changed = [(i, n) for i, n in enumerate(counts) if n != before[i]] if counts is not before else []
            history.append((step, changed))
            before = counts
        text = json.dumps({**vars(self), "history": history}, separators=(",", ":"), default=int).encode()
        entries, pairs = max(len(history) + coming, _ROOM[counts_vary]), _PAIR * len(self.nonzeros)
        size = _FIXED + 2 * _NUMBER * len(self.nonzeros) + pairs + entries * (_NUMBER + pairs * counts_vary)
        return F.pad(torch.frombuffer(bytearray(text), dtype=torch.uint8), (0, max(0, size - len(text))))

    @staticmethod
    def decode(tensor: Tensor) -> "State":
        """Read what `encode` wrote, in this version of the library or the first.

        Raises:
            ValueError: the tensor is something else.
        """
        try:
            if tensor.dtype == torch.int64:
                return _decode_integers(iter(tensor.tolist()))
            fields = json.loads(tensor.cpu().numpy().tobytes().rstrip(b"\0"))
            changes = [(step, dict(pairs)) for step, pairs in fields.pop("history")]
            return State(**fields, history=_entries(changes, len(fields["nonzeros"])))
        except (StopIteration, RuntimeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError("The state_dict's entry updater._extra_state is damaged or of another version.") from error


def _entries(changes: Iterable[tuple[int, dict[int, int]]], length: int) -> list[tuple[int, tuple[int, ...]]]:
    """Put the history together from what changed at each of its entries."""
    history, counts = [], (-1,) * length
    for step, changed in changes:
        counts = tuple(changed.get(i, n) for i, n in enumerate(counts)) if changed else counts
        history.append((step, counts))
    return history


def _decode_integers(numbers: Iterator[int]) -> State:
    """Read version 0.1: version, seed, total_steps, schedule, skipped, four lengths, then name, lists and history."""
    if next(numbers) != 2:
        raise IndexError
    seed, total, schedule, skipped, letters, clocks, counts, entries = (next(numbers) for _ in range(8))
    method = bytes(next(numbers) for _ in range(letters)).decode()
    times, nonzeros, targets = ([next(numbers) for _ in range(n)] for n in (clocks, counts, counts))
    changes = []
    for _ in range(entries):
        step, pairs = next(numbers), next(numbers)
        changes.append((step, {next(numbers): next(numbers) for _ in range(pairs)}))
    history = _entries(changes, counts)
    return State(method, seed, total, schedule, skipped, times, nonzeros, targets, history)
