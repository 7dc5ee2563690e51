"""Asking: what code asks, or does, while it is traced that no graph can hold.

Whether gradients are recorded, autocast and torch's other modes decide how an operation computes without being among its
arguments, so no graph shows them. Custom backward functions and recomputation are lost as well. Code that computes under
another mode, or that asks for one, is refused, and stays Python.
"""

import builtins
import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.utils import rnn
from torch.utils import _pytree as pytree
from torch.utils import checkpoint

from passes.capture.frames import is_users, module_of
from passes.capture.proxies import CannotTraceError, Value

_DEVICES = ("cpu", "cuda")
_SWITCHES: dict[str, Callable[[], Any]] = {
    name: switch
    for owner, names in (
        (torch, "is_grad_enabled is_inference_mode_enabled get_default_dtype get_float32_matmul_precision"),
        (torch._C, "_len_torch_function_stack _len_torch_dispatch_stack _get_cudnn_enabled"),
        (torch._C, "_get_math_sdp_enabled _get_flash_sdp_enabled _get_mem_efficient_sdp_enabled"),
    )
    for name in names.split()
    if (switch := getattr(owner, name, None))
}
_QUESTIONS = {  # torch's functions that tell a mode, by their names
    name: getattr(torch, name)
    for name in """is_grad_enabled is_inference_mode_enabled is_autocast_enabled is_autocast_cpu_enabled
    get_autocast_dtype get_autocast_gpu_dtype get_autocast_cpu_dtype is_autocast_cache_enabled""".split()
}
# What torch's `checkpoint` ends in, under every name.
_RECOMPUTING = [k for k in vars(checkpoint) if k.startswith(("CheckpointFunction", "_checkpoint_without_reentrant"))]
_autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
_set_hooks = _autograd._push_saved_tensors_default_hooks
_torch_jit_isinstance = torch.jit.isinstance
_is_casting, _casts_to = torch.is_autocast_enabled, torch.get_autocast_dtype
_tracing = threading.local()


def modes() -> tuple[Any, ...]:
    """Return torch's present modes, to be compared with those at another time."""
    casts = [(_is_casting(d), _casts_to(d)) for d in _DEVICES]
    return (*(switch() for switch in _SWITCHES.values()), *casts)


def changed_mode(before: tuple[Any, ...], now: tuple[Any, ...]) -> str:
    """Name the first mode that differs between two results of `modes`."""
    names = [*_SWITCHES, *(f"autocast ({device})" for device in _DEVICES)]
    return next(name for name, a, b in zip(names, before, now, strict=True) if a != b)


def refuse(what: str) -> None:
    """Refuse what code does, if it is being traced in this thread."""
    if tracer := getattr(_tracing, "tracer", None):
        tracer.refuse(what)


@contextlib.contextmanager
def traced_by(tracer: Any) -> Iterator[None]:
    """Let questions in this thread be refused by a tracer while the block runs."""
    before = getattr(_tracing, "tracer", None)
    _tracing.tracer = tracer
    try:
        yield
    finally:
        _tracing.tracer = before


class RecomputingError(NotImplementedError):
    """A module recomputes activations, and a graph would keep them."""


class _RefuseToRecompute:
    """Stands for both ways of `checkpoint` while a graph is traced."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.apply()

    @staticmethod
    def apply(*args: Any) -> None:
        raise RecomputingError("it recomputes activations (torch.utils.checkpoint), and a graph would keep them")


class _AskingType(type):
    """Makes `type(x)` answer as for the value that a proxy stands for, and `type` otherwise what it is."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and _is_proxy(args[0]):
            return args[0].tracer.kind_of(args[0])
        return builtins.type(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, builtins.type)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, builtins.type)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is builtins.type

    def __hash__(cls) -> int:
        return hash(builtins.type)


class _Type(metaclass=_AskingType):
    """Stands for the builtin `type` in the user's modules while they are traced."""


def _is_proxy(value: Any) -> bool:
    return isinstance(value, Value)


def _isinstance(value: Any, classes: Any) -> bool:
    if not _is_proxy(value):
        return isinstance(value, classes)
    kind = value.tracer.kind_of(value)
    if kind is Tensor and any(builtins.type(c).__name__ == "tensortype" for c in pytree.tree_leaves(classes)):
        value.tracer.refuse("asks for the number format of a tensor")  # as torch.FloatTensor does
    return issubclass(kind, classes)


def _jit_isinstance(value: Any, kind: Any) -> bool:
    if _is_proxy(value) and not all(isinstance(c, builtins.type) for c in pytree.tree_leaves(kind)):
        value.tracer.refuse(f"asks whether a value is of the type {kind}")
    return _isinstance(value, kind) if _is_proxy(value) else _torch_jit_isinstance(value, kind)


def _dispatching(function: Any) -> Callable[..., Any]:
    """Stand for a `functools.singledispatch` function, which goes by the class of its first argument."""

    @functools.wraps(function)
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        kind = args[0].tracer.kind_of(args[0]) if args and _is_proxy(args[0]) else None
        return function.dispatch(kind)(*args, **kwargs) if kind else function(*args, **kwargs)

    return dispatch


def _is_tensor(value: Any) -> bool:
    return _isinstance(value, Tensor)


def _hasattr(value: Any, name: str) -> bool:
    return hasattr(value.tracer.kind_of(value) if _is_proxy(value) else value, name)


def _getattr(value: Any, name: str, *default: Any) -> Any:
    if default and _is_proxy(value) and not _hasattr(value, name):
        return default[0]
    return getattr(value, name, *default)


def _callable(value: Any) -> bool:
    if _is_proxy(value):
        return any("__call__" in vars(cls) for cls in value.tracer.kind_of(value).__mro__)
    return callable(value)


def _refused(name: str) -> Callable[..., Any]:
    """Stand for one of torch's questions: the user's code gets no answer while it is traced, torch's own does."""

    @functools.wraps(_QUESTIONS[name])
    def ask(*args: Any, **kwargs: Any) -> Any:
        if is_users(module_of(sys._getframe(1))):
            refuse(f"asks torch.{name}()")
        return _QUESTIONS[name](*args, **kwargs)

    return ask


_BUILTINS = {"isinstance": _isinstance, "type": _Type, "hasattr": _hasattr, "getattr": _getattr, "callable": _callable}
_ANSWERS: dict[tuple[ModuleType, str], Callable[..., Any]] = {
    **{(torch, name): _refused(name) for name in _QUESTIONS},
    (torch, "is_tensor"): _is_tensor,
    (torch.jit, "isinstance"): _jit_isinstance,
}
_STOOD_FOR = {id(getattr(owner, name)): answer for (owner, name), answer in _ANSWERS.items()}


def _custom_function(self: Any, *args: Any) -> None:
    with contextlib.suppress(CannotTraceError):  # torch crashes where this raises; the tracer remembers it
        refuse("applies a custom autograd.Function, whose backward a graph would lose")


def _refuse_hooks(*hooks: Any) -> None:
    refuse("sets saved_tensors_hooks")
    _set_hooks(*hooks)


@contextlib.contextmanager
def answering(model: nn.Module) -> Iterator[None]:
    """Answer or refuse what a model's code asks while it is traced; code that runs elsewhere meanwhile notices nothing."""
    patches = [(namespace, name, answer) for namespace in _namespaces(model) for name, answer in _answers(namespace)]
    patches += [(owner.__dict__, name, answer) for (owner, name), answer in _ANSWERS.items()]
    before = [namespace.get(name) for namespace, name, _ in patches]
    try:
        for namespace, name, answer in patches:
            namespace[name] = answer
        custom = mock.patch.object(BackwardCFunction, "__init__", _custom_function, create=True)
        with custom, mock.patch.object(_autograd, _set_hooks.__name__, _refuse_hooks):
            yield
    finally:
        for (namespace, name, _), value in zip(patches, before, strict=True):
            if value is None:
                namespace.pop(name, None)
            else:
                namespace[name] = value


def recomputing_refused() -> Any:
    """Refuse activation checkpointing while a block runs."""
    return mock.patch.dict(vars(checkpoint), dict.fromkeys(_RECOMPUTING, _RefuseToRecompute))


def _answers(namespace: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what to put into a module's globals: the builtins that it reads, and questions that it has imported."""
    yield from ((name, answer) for name, answer in _BUILTINS.items() if name not in namespace)
    functions = [(n, f) for n, f in namespace.items() if isinstance(f, FunctionType) and "registry" in vars(f)]
    yield from ((name, _dispatching(f)) for name, f in functions if hasattr(f, "dispatch"))
    yield from ((name, _STOOD_FOR[id(value)]) for name, value in namespace.items() if id(value) in _STOOD_FOR)


def _namespaces(model: nn.Module) -> list[dict[str, Any]]:
    """Return the globals of the packages that the model's classes come from, and of the functions that they import."""
    classes = {cls for kind in {type(m) for m in model.modules()} for cls in kind.__mro__}
    packages = {cls.__module__.partition(".")[0] for cls in classes if is_users(cls.__module__)}
    loaded = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] in packages]
    own = [module.__dict__ for module in loaded if isinstance(module, ModuleType)]
    imported = [value for namespace in own for value in list(namespace.values()) if isinstance(value, FunctionType)]
    used = [function.__globals__ for function in imported]
    found = {id(n): n for n in [*own, *used] if is_users(n.get("__name__") or "")}
    found[id(rnn.__dict__)] = rnn.__dict__  # torch's own, which asks what it gets
    return list(found.values())
