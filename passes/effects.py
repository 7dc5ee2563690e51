"""What Python code leaves behind when it runs: random numbers drawn, attributes written.

A graph records tensor operations only. Code that also draws random numbers while it is traced, or writes to its module,
would be frozen at what it did once; comparing a snapshot before with the state after is how `capture` finds out.
"""

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

_CONTAINERS = (dict, list, set)


def rng_state() -> tuple[Any, ...]:
    """Return the state of the global generators of torch (CPU), Python and numpy."""
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def set_rng_state(state: tuple[Any, ...]) -> None:
    """Put the global generators back to a state that `rng_state` returned."""
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    np.random.set_state(state[2])


def _rng_moved(before: tuple[Any, ...]) -> bool:
    torch_state, python_state, (_, keys, position, *_) = rng_state()
    return (
        not torch.equal(torch_state, before[0])
        or python_state != before[1]
        or position != before[2][2]
        or not np.array_equal(keys, before[2][1])
    )


@contextlib.contextmanager
def preserve_rng() -> Iterator[None]:
    """Run a block and put the global generators back as they were."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


@dataclass(frozen=True)
class Snapshot:
    """The random generators and one module's own attributes and buffers, as they were."""

    rng: tuple[Any, ...]
    attributes: dict[str, Any]
    buffers: dict[str, tuple[torch.Tensor, int, torch.Tensor]]  # name: (buffer, version, copy of its values)

    @classmethod
    def of(cls, module: nn.Module, rng: tuple[Any, ...]) -> "Snapshot":
        """Take a snapshot of `module` itself, not of its children, while the generators are in the state `rng`."""
        attributes = {k: v.copy() if isinstance(v, _CONTAINERS) else v for k, v in vars(module).items()}
        buffers = {k: (b, b._version, b.detach().clone()) for k, b in module._buffers.items() if b is not None}
        return cls(rng, attributes, buffers)

    def difference(self, module: nn.Module) -> str | None:
        """Say what has changed since, or return None where nothing has."""
        if _rng_moved(self.rng):
            return "draws random numbers"
        now = vars(module)
        for name in now.keys() ^ self.attributes.keys():
            return f"writes its attribute {name!r}"
        for name, saved in self.attributes.items():
            if now[name] is not saved and not _same(now[name], saved):
                return f"writes its attribute {name!r}"
        for name, (buffer, version, _) in self.buffers.items():
            if buffer._version != version:
                return f"writes its buffer {name!r}"
        return None

    def restore(self, module: nn.Module) -> None:
        """Undo every change: generators, attributes, what containers hold, and buffer values."""
        set_rng_state(self.rng)
        now = vars(module)
        for name in now.keys() - self.attributes.keys():
            del now[name]
        for name, saved in self.attributes.items():
            if isinstance(saved, _CONTAINERS) and type(now.get(name)) is type(saved):
                _refill(now[name], saved)
            else:
                now[name] = saved
        for buffer, version, values in self.buffers.values():
            if buffer._version != version:
                buffer.copy_(values)


def _same(now: Any, saved: Any) -> bool:
    # Elements are compared by identity: `==` on a value that holds an fx.Proxy would be recorded into the graph.
    if not isinstance(saved, _CONTAINERS) or type(now) is not type(saved):
        return now is saved
    if isinstance(saved, dict) and isinstance(now, dict):
        return now.keys() == saved.keys() and all(now[k] is saved[k] for k in saved)
    return len(now) == len(saved) and {id(v) for v in now} == {id(v) for v in saved}


def _refill(container: Any, saved: Any) -> None:
    container.clear()
    container.extend(saved) if isinstance(container, list) else container.update(saved)
