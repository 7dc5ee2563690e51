"""Copies: a model copied together with the hooks that refer to it.

`copy.deepcopy` copies a hook that is a function as it is, so that one which refers to its model would go on writing to the
original.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_HOLDERS = frozenset([Tensor, list, tuple, dict])
_INTERNAL = frozenset(vars(nn.Module()))


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> Any:
    """Return a deep copy of a model whose forward hooks refer to the copy wherever they referred to the model.

    Args:
        model: any module.
        memo: what `copy.deepcopy` takes: {id of an object: its copy}.
    """
    memo = {} if memo is None else memo
    for tensor in _activations(model):
        memo.setdefault(id(tensor), tensor.detach().clone())
    hooked = [hooks for m in model.modules() for kind in FORWARD_HOOKS if (hooks := vars(m)[kind])]
    for hooks in hooked:
        memo[id(hooks)] = type(hooks)()
    result = copy.deepcopy(model, memo)
    for hooks in hooked:
        memo[id(hooks)].update({k: _for_copy(hook, memo) for k, hook in hooks.items()})
    return result


def _activations(model: nn.Module) -> list[Tensor]:
    """Return the results of operations that modules keep as attributes, which Python's copy refuses."""
    own = [v for m in model.modules() for k, v in vars(m).items() if type(v) in _HOLDERS and k not in _INTERNAL]
    return [t for t in pytree.tree_leaves(own) if isinstance(t, Tensor) and not t.is_leaf]


def hooks_of(model: nn.Module) -> list[Callable[..., Any]]:
    """Return the forward hooks of a model and of the modules inside it."""
    return [h for m in model.modules() for hooks in FORWARD_HOOKS for h in vars(m)[hooks].values()]


def _for_copy(value: Any, memo: Mapping[int, Any]) -> Any:
    """Return a hook, or what it refers to, with the copy in place of the original."""
    if isinstance(value, nn.Module):
        return memo.get(id(value), value)
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _for_copy(value.__self__, memo))
    if isinstance(value, functools.partial):
        options = {k: _for_copy(v, memo) for k, v in value.keywords.items()}
        return functools.partial(_for_copy(value.func, memo), *(_for_copy(a, memo) for a in value.args), **options)
    if isinstance(value, FunctionType) and value.__closure__:
        cells = tuple(CellType(_for_copy(cell.cell_contents, memo)) for cell in value.__closure__)
        if any(new.cell_contents is not old.cell_contents for new, old in zip(cells, value.__closure__, strict=True)):
            new = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
            new.__kwdefaults__ = value.__kwdefaults__
            return new
    return value
