"""What Python code leaves behind when it runs: random numbers drawn, attributes, containers, objects and globals written.

A graph records tensor operations only. Code that does more while it is traced would be frozen at what it did once; a snapshot
from before, compared with the state after, is how `capture` finds out.
"""

import contextlib
import functools
import logging
import random
from collections.abc import Callable, Iterable, Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from passes.capture.records import (
    MISSING,
    RECORDS,
    AttributesRecord,
    ClassRecord,
    GlobalRecord,
    MappingRecord,
    Record,
    TensorRecord,
)

_ATOMS = frozenset(
    (
        *(type(None), bool, int, float, complex, str, bytes, range, slice, torch.dtype, torch.device, torch.Size),
        *(FunctionType, MethodType, BuiltinFunctionType, ModuleType, nn.Parameter),
    )
)
_OWN = ("_parameters", "_buffers", "_modules")
_UNWRITTEN = frozenset(vars(nn.Module())) - {*_OWN}  # such as hooks: forward does not write these


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


@contextlib.contextmanager
def modes_kept(model: nn.Module, evaluating: bool = False) -> Iterator[None]:
    """Run a block and put the modes of all modules back; `evaluating` sets them to evaluation without calling `eval`."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes if evaluating else ():
            vars(module)["training"] = False
        yield
    finally:
        for module, mode in modes.items():
            vars(module)["training"] = mode


class Snapshot:
    """The random generators, and the Python state that some modules and hooks can reach, as they were.

    That is their attributes, buffers, and tensors, what containers and plain objects among these hold, the attributes of the
    classes, and the globals that the code names.

    Args:
        modules: whose state to remember.
        functions: whose closures and globals to remember.
    """

    def __init__(self, modules: Iterable[nn.Module], functions: Iterable[Callable[..., Any]] = ()) -> None:
        self.rng = rng_state()
        self._records: dict[int, Record] = {}
        self._classes: set[type] = set()
        self._modules = [(module, list(self._of_module(module))) for module in modules]
        self._shared = list(self._of_code(functions))

    def difference(self, module: nn.Module | None = None) -> str | None:
        """Say what has changed since, in all modules or in one and the modules inside it; None where nothing has."""
        if _rng_moved(self.rng):
            return "draws random numbers"
        return next((record.what() for record in self._chosen(module) if record.changed()), None)

    def restore(self, module: nn.Module | None = None) -> None:
        """Undo the changes of all modules, or of one and the modules inside it."""
        set_rng_state(self.rng)
        for record in self._chosen(module):
            if record.changed():
                record.restore()

    def _chosen(self, module: nn.Module | None) -> Iterator["Record"]:
        inside = None if module is None else set(module.modules())
        for owner, records in self._modules:
            if inside is None or owner in inside:
                yield from records
        yield from self._shared

    def _of_module(self, module: nn.Module) -> Iterator["Record"]:
        attributes = vars(module)
        yield AttributesRecord(attributes, "writes its attribute")
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield from self._reach(buffer, f"writes its buffer {name!r}")
        unwritten = _UNWRITTEN if _is_users(type(module)) else _UNWRITTEN | {k for k in _OWN if not attributes[k]}
        for name, value in attributes.items():
            if type(value) not in _ATOMS and name not in unwritten:
                yield from self._reach(value, f"writes its attribute {name!r}")
        self._classes.update(c for c in type(module).__mro__ if _is_users(c))

    def _of_code(self, functions: Iterable[Callable[..., Any]]) -> Iterator["Record"]:
        code = [f for cls in self._classes for f in functions_of(cls)]
        for cls in self._classes:
            yield ClassRecord(cls, f"writes an attribute of its class {cls.__name__}")
        for function in functions:
            function = function.__func__ if isinstance(function, MethodType) else function
            for cell in getattr(function, "__closure__", None) or ():
                with contextlib.suppress(ValueError):  # an empty cell
                    yield from self._reach(cell.cell_contents, "writes to what a hook remembers")
            code += [function] if isinstance(function, FunctionType) else []
        for function in code:
            for name in _global_names(function.__code__):
                value = function.__globals__.get(name, MISSING)
                if value is not MISSING and id(value) not in self._records:
                    yield GlobalRecord(function.__globals__, name, f"writes the global {name!r}")
                    yield from self._reach(value, f"writes to the global {name!r}")

    def _reach(self, value: Any, label: str) -> Iterator["Record"]:
        """Yield records of a value and of what can be reached from it; modules have their own."""
        kind = type(value)
        if kind in _ATOMS or id(value) in self._records or isinstance(value, (nn.Module, type)):
            return
        if kind is tuple or kind is frozenset:
            for item in value:
                yield from self._reach(item, label)
            return
        record = _record(value, label)
        if record is None:
            return
        self._records[id(value)] = record
        yield record
        for item in record.items():
            if type(item) not in _ATOMS:
                yield from self._reach(item, label)


def _record(value: Any, label: str) -> "Record | None":
    if isinstance(value, Tensor):
        return None if value.is_inference() or isinstance(value, nn.Parameter) else TensorRecord(value, label)
    for kind, bases in RECORDS.items():
        if isinstance(value, bases):
            return kind(value, label)
    return MappingRecord(vars(value), label) if hasattr(value, "__dict__") and _is_users(type(value)) else None


_FOREIGN = ("torch", "numpy", "logging", "threading", "_thread", "re", "functools", "weakref", "types", "builtins")


@functools.cache
def _is_users(cls: type) -> bool:
    """Whether a class may keep state that forward writes; what loggers remember does not count."""
    return cls.__module__.partition(".")[0] not in _FOREIGN and not issubclass(cls, logging.Logger)


@functools.cache
def functions_of(cls: type) -> tuple[FunctionType, ...]:
    """Return the functions that a class of the user's defines itself."""
    if not _is_users(cls):
        return ()
    return tuple(f for f in vars(cls).values() if isinstance(f, FunctionType))


@functools.cache
def _global_names(code: CodeType) -> tuple[str, ...]:
    """Return the global names that a function reads or writes, functions inside it included."""
    inner = [name for const in code.co_consts if isinstance(const, CodeType) for name in _global_names(const)]
    return tuple(dict.fromkeys([*code.co_names, *inner]))  # names of attributes among them do no harm
