"""Hosts: modules that carry children of this library, masks and the updater, which their own code never meets.

What Python code reads of a masked weight while such a module runs is the masked weight; everybody else, optimizers and
`state_dict` among them, gets the parameter. Nothing is swapped, so any number of threads may run one model.
"""

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn

from passes.capture.frames import module_of

_thread = threading.local()


class Guest(nn.Module):
    """A child that belongs to this library."""

    def read(self, weight: Any) -> Any:
        """Return what Python code gets that reads a weight of the module; masks give the masked one."""
        return weight

    def saved(self, weight: Any) -> Any:
        """Return what a state_dict shows for a parameter of the module."""
        return weight

    def load(self, weight: nn.Parameter, state_dict: dict[str, Any], name: str) -> None:
        """Make a parameter of the module and what a state_dict has for it fit each other, before it is loaded."""


class Host(nn.Module):
    """Mixin: hides guests from code that goes through the children, and masks what is read of its weights while it runs."""

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        reader = getattr(_thread, "reader", None)
        if reader and name in self._parameters and (mask := _mask_of(self, name)):
            return mask(value) if reader == "torch" else mask.read(value)
        return value

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, _, guest in _masked_parameters(self):
            if (key := prefix + name) in destination:  # the class may save otherwise
                destination[key] = guest.saved(destination[key])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, weight, guest in _masked_parameters(self):
            guest.load(weight, state_dict, prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the children that the module had before it was made sparse; torch, which moves and saves them, gets all."""
        everything = not torch.compiler.is_compiling() and _asked_by_torch(sys._getframe(1))
        return ((n, child) for n, child in super().named_children() if everything or not isinstance(child, Guest))


def _asked_by_torch(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_name in ("children", "named_children"):
        frame = frame.f_back
    return frame is not None and module_of(frame).startswith("torch.")


def masked(module: nn.Module, name: str, role: str | None = None) -> Any:
    """Return a parameter of a module as its consumer, which has a role, must see it: through its mask, if it has one."""
    if name not in module._parameters:  # a hook of torch.nn.utils has put a tensor in its place
        return getattr(module, name)
    parameter, mask = module._parameters[name], _mask_of(module, name)
    return mask(parameter, role) if mask else parameter


def _mask_of(module: nn.Module, name: str) -> Guest | None:
    mask = module._modules.get(f"{name}_mask")
    return mask if isinstance(mask, Guest) else None


def _masked_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter, Guest]]:
    found = ((name, weight, _mask_of(module, name)) for name, weight in module._parameters.items())
    return [(name, weight, mask) for name, weight, mask in found if weight is not None and mask]


def run_reading(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run Python code that reads weights: in this thread, and until it returns, it gets the masked ones.

    Code of the user's may also write to what it reads; torch's does not.
    """
    before = getattr(_thread, "reader", None)
    _thread.reader = "torch" if function.__module__.startswith("torch.") else "user"
    try:
        return function(*args, **kwargs)
    finally:
        _thread.reader = before


def run_graph(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a graph's code, which masks by its own nodes what it reads, also where Python code that reads weights calls it."""
    before = None if torch.compiler.is_compiling() else getattr(_thread, "reader", None)
    if before is None:
        return function(*args, **kwargs)
    _thread.reader = None
    try:
        return function(*args, **kwargs)
    finally:
        _thread.reader = before


def _without_guests(module: nn.Module, base: type[nn.Module]) -> Any:
    """Return a module of the class `base` with the same attributes and children, guests excepted."""
    plain = nn.Module.__new__(base)
    children = ((name, child) for name, child in module._modules.items() if not isinstance(child, Guest))
    vars(plain).update(vars(module), _modules=OrderedDict(children))
    return plain


def _delegate(base: type[nn.Module], name: str) -> Callable[..., Any]:
    def method(self: nn.Module, *args: Any) -> Any:
        return getattr(base, name)(_without_guests(self, base), *args)

    return method


def container_methods(base: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """Return methods for a class derived from `base` that hide the guests of containers.

    nn.Sequential, nn.ModuleList and nn.ModuleDict read their children past `named_children`.
    """
    if not issubclass(base, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return {}
    names = ("__len__", "__iter__", "__getitem__", "__contains__", "keys", "values", "items")
    return {name: _delegate(base, name) for name in names if hasattr(base, name)}
