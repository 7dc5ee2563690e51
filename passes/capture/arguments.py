"""Arguments: which kinds of arguments a graph was traced for.

A graph holds for them alone: code that tests `mask is None` or `flag is True` took one branch while it was traced.
"""

import dis
import functools
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from torch import Tensor, fx

# What no code tells apart by identity: a graph that asked nothing else of an argument holds for these as for tensors.
_NEUTRAL = (tuple, list, dict)


@dataclass(frozen=True)
class Arguments:
    """The arguments that a graph holds for.

    Attributes:
        names: of the positional arguments of forward, in order, without `self`.
        tensors: the required arguments that have to be tensors, because code asked.
        defaults: {name: the only value that an optional argument may have}.
        distinct: whether no two arguments may be one object, because code compares them.
    """

    names: tuple[str, ...]
    tensors: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    distinct: bool = False

    def fit(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a graph holds for the arguments of a call."""
        given = [*zip(self.names, args, strict=False), *kwargs.items()]
        if not all(self._holds_for(name, value) for name, value in given):
            return False
        return not self.distinct or all(a is not b for i, (_, a) in enumerate(given) for _, b in given[:i])

    def _holds_for(self, name: str, value: Any) -> bool:
        if name in self.defaults:
            return is_default(value, self.defaults[name])
        if isinstance(value, (Tensor, fx.Proxy)):
            return True
        return name not in self.tensors and (isinstance(value, _NEUTRAL) or type(value) in (int, float))


def is_default(value: Any, default: Any) -> bool:
    """Whether an argument is the default that a graph was traced with."""
    return value is default or (not isinstance(value, Tensor) and type(value) is type(default) and value == default)


def arguments_of(forward: Any, assumed: Iterable[str], functions: Iterable[Any]) -> Arguments:
    """Return what a graph of `forward` holds for.

    Args:
        forward: the unbound method that was traced.
        assumed: the arguments that were taken for tensors when code asked.
        functions: the functions whose code was traced through.
    """
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    names = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    distinct = any(_compares_variables(function.__code__) for function in functions)
    return Arguments(names, frozenset(assumed) - defaults.keys(), defaults, distinct)


@functools.cache
def _compares_variables(code: CodeType) -> bool:
    """Whether a function compares one local variable to another by `is`."""
    previous = ""
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IS_OP" and previous.startswith("LOAD_FAST"):
            return True
        previous = instruction.opname if instruction.opname != "CACHE" else previous
    return False
