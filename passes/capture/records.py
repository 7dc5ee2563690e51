"""Records: mutable things that Python code can reach, as they were, to be compared and put back."""

import random
from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

MISSING = object()


class Record:
    """One mutable thing as it was; elements are compared by identity, since `==` on an fx.Proxy would be recorded."""

    def __init__(self, value: Any, label: str) -> None:
        self.value, self.label = value, label
        self.saved = self.copy()

    def copy(self) -> Any:
        return list(self.value)

    def changed(self) -> bool:
        now, saved = self.value, self.saved
        return len(now) != len(saved) or any(a is not b for a, b in zip(now, saved, strict=True))

    def restore(self) -> None:
        self.value.clear()
        self.value.extend(self.saved)

    def items(self) -> Iterable[Any]:
        """Return what it holds, to be looked at in turn."""
        return ()

    def what(self) -> str:
        """Say what was written to."""
        return self.label


class ListRecord(Record):
    """A list or a deque."""

    def items(self) -> Iterable[Any]:
        return self.saved


class SetRecord(ListRecord):
    """A set."""

    def copy(self) -> Any:
        return set(self.value)

    def changed(self) -> bool:
        return {id(v) for v in self.value} != {id(v) for v in self.saved}

    def restore(self) -> None:
        self.value.clear()
        self.value.update(self.saved)


class MappingRecord(Record):
    """A dict of any kind, or the attributes of a plain object; read past what a subclass makes of reading."""

    def copy(self) -> Any:
        return dict(dict.items(self.value))

    def changed(self) -> bool:
        now, saved = self.value, self.saved
        return dict.__len__(now) != len(saved) or any(dict.get(now, k, MISSING) is not v for k, v in saved.items())

    def restore(self) -> None:
        base = OrderedDict if isinstance(self.value, OrderedDict) else dict  # subclasses may refuse writes
        base.clear(self.value)
        base.update(self.value, self.saved)

    def items(self) -> Iterable[Any]:
        return self.saved.values()


class AttributesRecord(MappingRecord):
    """The attributes of a module; `training` is the tracer's to set."""

    def changed(self) -> bool:
        return bool(self._written())

    def what(self) -> str:
        return f"{self.label} {self._written()[0]!r}"

    def _written(self) -> list[str]:
        now, saved = self.value, self.saved
        new = [k for k in now if k not in saved] if len(now) != len(saved) else []
        return new + [k for k, v in saved.items() if now.get(k, MISSING) is not v and k != "training"]


class ClassRecord(MappingRecord):
    """The attributes of a class, which has a read-only view of them."""

    def copy(self) -> Any:
        return dict(vars(self.value))

    def changed(self) -> bool:
        now, saved = vars(self.value), self.saved
        return len(now) != len(saved) or any(now.get(k, MISSING) is not v for k, v in saved.items())

    def restore(self) -> None:
        for name in vars(self.value).keys() - self.saved.keys():
            delattr(self.value, name)
        for name, value in self.saved.items():
            if vars(self.value).get(name, MISSING) is not value:
                setattr(self.value, name, value)


class GlobalRecord(Record):
    """What a global name is bound to."""

    def __init__(self, namespace: dict[str, Any], name: str, label: str) -> None:
        self.name = name
        super().__init__(namespace, label)

    def copy(self) -> Any:
        return self.value[self.name]

    def changed(self) -> bool:
        return self.value.get(self.name, MISSING) is not self.saved

    def restore(self) -> None:
        self.value[self.name] = self.saved


class TensorRecord(Record):
    """A tensor that is not a parameter: writes in place raise its version."""

    def copy(self) -> Any:
        self.version = self.value._version
        return None if self.value.is_meta else self.value.detach().clone()

    def changed(self) -> bool:
        return self.value._version != self.version

    def restore(self) -> None:
        if self.saved is not None:
            self.value.detach().copy_(self.saved)
        self.version = self.value._version


class ArrayRecord(Record):
    """A numpy array."""

    def copy(self) -> Any:
        return self.value.copy()

    def changed(self) -> bool:
        return not np.array_equal(self.value, self.saved, equal_nan=self.value.dtype.kind in "fc")

    def restore(self) -> None:
        self.value[...] = self.saved


class GeneratorRecord(Record):
    """A generator of random numbers of the module's own."""

    def copy(self) -> Any:
        if isinstance(self.value, torch.Generator):
            return self.value.get_state()
        return self.value.getstate() if isinstance(self.value, random.Random) else self.value.bit_generator.state

    def changed(self) -> bool:
        now = self.copy()
        return not torch.equal(now, self.saved) if isinstance(now, Tensor) else repr(now) != repr(self.saved)

    def restore(self) -> None:
        if isinstance(self.value, torch.Generator):
            self.value.set_state(self.saved)
        elif isinstance(self.value, random.Random):
            self.value.setstate(self.saved)
        else:
            self.value.bit_generator.state = self.saved


RECORDS: dict[type[Record], tuple[type, ...]] = {
    MappingRecord: (dict,),
    ListRecord: (list, deque),
    SetRecord: (set,),
    ArrayRecord: (np.ndarray,),
    GeneratorRecord: (torch.Generator, random.Random, np.random.Generator),
}
