"""Tracer: what one graph shows and what it calls whole.

fx is silently wrong on more than it refuses: optional arguments, random numbers, Python state. What cannot be traced
faithfully stays a call, of a module or of a function.
"""

import inspect
import itertools
import traceback
from collections.abc import Callable, Container, Iterable
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.utils import checkpoint

from passes.effects import Snapshot
from passes.operands import is_view

# What torch's `checkpoint` ends in, by whatever name it was called.
_RECOMPUTING = [k for k in vars(checkpoint) if k.startswith(("CheckpointFunction", "_checkpoint_without_reentrant"))]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_builtin(module: nn.Module) -> bool:
    """Tell whether a graph keeps `module` whole: all the code it runs on weights is torch.nn's, and it is no nn.Sequential.

    An nn.TransformerEncoder of layers that the user wrote is none, nor is a parametrized layer: its graph shows how the
    weight is made.
    """
    own = type(module).forward.__module__.startswith(("torch.nn", "torch.ao.nn")) and not (
        isinstance(module, (nn.Sequential, ParametrizationList)) or is_parametrized(module)
    )
    return own and all(is_builtin(c) or next(c.parameters(), None) is None for c in module.children())


def is_called_whole(module: nn.Module) -> bool:
    """Tell whether a graph calls `module` as it is: it has no parameters, or hooks that must go on running.

    A module without parameters gains nothing from being traced, and stays exact in what a graph would freeze:
    its own mode, randomness, Python state.
    """
    return any(getattr(module, hooks) for hooks in _HOOKS) or next(module.parameters(), None) is None


def expect_default(value: Any, default: Any, name: str) -> None:
    """Raise unless an optional argument of `forward` has the value that it was traced with."""
    if value is default or (not isinstance(value, torch.Tensor) and value == default):
        return
    raise ValueError(
        f"forward({name}=...) was traced at its default {default!r} and the graph holds no other case. "
        f"Leave {name!r} out, or make it a required argument of forward before the model is captured."
    )


fx.wrap("expect_default")


class RecomputingError(NotImplementedError):
    """A module recomputes activations, and a graph would keep them."""


class _RefuseToRecompute:
    """Stands for both ways of `checkpoint` while a graph is traced."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.apply()

    @staticmethod
    def apply(*args: Any) -> None:
        raise RecomputingError("it recomputes activations (torch.utils.checkpoint), and a graph would keep them")


class Tracer(fx.Tracer):
    """Traces with optional arguments at their defaults; calls whole whatever it cannot trace faithfully.

    `rng` is the state of the random generators, which tracing must not move. `called` are Python functions that the graph
    calls as they are; `refused` collects those that cannot be traced into. `blocks` are modules that a graph calls whole
    because somebody wants to go on calling them as modules.
    """

    proxy_buffer_attributes = True  # a buffer is read when the graph runs, not when it is traced

    def __init__(
        self, rng: tuple[Any, ...], called: Iterable[Callable[..., Any]] = (), blocks: Container[nn.Module] = ()
    ) -> None:
        super().__init__(autowrap_functions=tuple(called))
        self.rng, self.blocks = rng, blocks
        self.refused: set[Callable[..., Any]] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_builtin(m) or is_called_whole(m) or m in self.blocks

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.path_of_module(m)
        inside = self._gets_parameter(m, args, kwargs)
        leaf = self.is_leaf_module(m, path) and not inside
        if leaf or type(m).forward is nn.Sequential.forward:  # which has no effects of its own
            return super().call_module(m, forward, args, kwargs)
        last, before = next(iter(reversed(self.graph.nodes)), None), Snapshot.of(m, self.rng)
        try:
            result = forward(*args, **kwargs) if inside else super().call_module(m, forward, args, kwargs)
            if before.difference(m) is None:
                return result
        except Exception as error:  # whatever the user's code raises on a Proxy: `trace` goes on inside and says why
            self.refused |= failing_function(error)
        before.restore(m)
        self._erase_after(last)
        return self.create_proxy("call_module", path, args, kwargs)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace, and refuse what recomputes activations."""
        with mock.patch.dict(vars(checkpoint), dict.fromkeys(_RECOMPUTING, _RefuseToRecompute)):
            return super().trace(root, concrete_args)

    def _gets_parameter(self, m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Tell whether a user's module without parameters is given one: it may be a product made a module."""
        nodes = [value.node for value in (*args, *kwargs.values()) if isinstance(value, fx.Proxy)]
        for i, node in enumerate(nodes):
            while is_view(node):
                node = nodes[i] = node.all_input_nodes[0]
        hooked = any(getattr(m, hooks) for hooks in _HOOKS)
        return any(node.op == "get_attr" for node in nodes) and not (is_builtin(m) or hooked)

    def _erase_after(self, last: fx.Node | None) -> None:
        while (node := next(iter(reversed(self.graph.nodes)), None)) is not last and node is not None:
            self.graph.erase_node(node)

    def _proxy_placeholder(self, name: str, concrete_args: Any, sig: inspect.Signature, fn_for_analysis: Any) -> Any:
        proxy = super()._proxy_placeholder(name, concrete_args, sig, fn_for_analysis)
        parameter = sig.parameters.get(name)
        if parameter is None or parameter.default is inspect.Parameter.empty:
            return proxy
        guard = self.create_proxy("call_function", expect_default, (proxy, parameter.default, name), {})
        guard.node.meta["is_wrapped"] = True  # generated code must keep the call when it is traced again
        return parameter.default


def failing_function(error: Exception) -> set[Callable[..., Any]]:
    """Find the function that a module's forward called and that raised; an empty set if the forward itself did.

    One that recomputes activations of the module's layers would hide them in a call: there it is the forward, too.
    """
    if isinstance(error, RecomputingError):
        return set()
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for caller, callee in itertools.pairwise(frames):
        function: Any = caller.f_globals.get(callee.f_code.co_name)
        user = inspect.isfunction(function) and not function.__module__.startswith(("torch.", "passes."))
        if user and function.__code__ is callee.f_code and "self" in caller.f_locals:
            return {function}
    return set()
