"""Capture: trace a model into one fx graph per mode.

An analysis: it finds the maximal regions that fx can trace and changes nothing. `passes.captured.install` then makes
the model run the graphs.
"""

import contextlib
import inspect
import itertools
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from passes.effects import Snapshot, rng_state
from passes.operands import is_view

_RESERVED = frozenset(vars(fx.GraphModule)) - frozenset(vars(nn.Module)) | {"meta"}
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


class _Tracer(fx.Tracer):
    """Traces with optional arguments at their defaults; calls whole whatever it cannot trace faithfully.

    `rng` is the state of the random generators, which tracing must not move. `called` are Python functions that the graph
    calls as they are; `refused` collects those that cannot be traced into.
    """

    proxy_buffer_attributes = True  # a buffer is read when the graph runs, not when it is traced

    def __init__(self, rng: tuple[Any, ...], called: Iterable[Callable[..., Any]] = ()) -> None:
        super().__init__(autowrap_functions=tuple(called))
        self.rng = rng
        self.refused: set[Callable[..., Any]] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_builtin(m) or is_called_whole(m)

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
            self.refused |= _failing_function(error)
        before.restore(m)
        self._erase_after(last)
        return self.create_proxy("call_module", path, args, kwargs)

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


def _check_names(module: nn.Module, path: str) -> None:
    own = {k for cls in type(module).__mro__ if not issubclass(nn.Module, cls) for k in vars(cls)}
    own |= vars(module).keys() | module._parameters.keys() | module._buffers.keys() | module._modules.keys()
    if not isinstance(module, fx.GraphModule) and (
        taken := sorted(_RESERVED & own - {"__new__", "__doc__"} - set(vars(nn.Module)))
    ):
        raise ValueError(
            f"{path or type(module).__name__!r} has attributes that fx.GraphModule needs for itself: {', '.join(taken)}. "
            f"Rename them in the model."
        )


@dataclass(frozen=True)
class Region:
    """A module that fx traces: one graph per mode, the same object where the modes do not differ.

    `constants` are the tensors that forward creates and the graphs read, by attribute name.
    """

    graphs: dict[bool, fx.Graph]  # {module.training: graph}
    constants: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Capture:
    """What `trace` found, by module path.

    Attributes:
        regions: the modules that are graphs.
        opaque: the modules that stay Python code, each with the reason.
        leaves: torch.nn's own modules that such code calls and that are no graphs either, such as nn.GRU.
    """

    regions: dict[str, Region]
    opaque: dict[str, str]
    leaves: tuple[str, ...] = ()


def trace(model: nn.Module) -> Capture:
    """Trace the maximal traceable regions of a model; the model is left as it was.

    The whole model is one region (path "") where fx can trace it. A module whose Python code cannot be traced, or that
    does more than a graph can hold (draws random numbers, writes buffers), stays a module; the search goes on inside it.

    Args:
        model: any module, on any device including meta.

    Returns:
        The regions and the reasons for what is not one.

    Raises:
        ValueError: a region has attributes that `fx.GraphModule` needs for itself.

    Example:
        >>> capture = trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
        >>> [node.name for node in capture.regions[""].graphs[True].nodes]
        ['input_1', '_0', '_1', 'output']
    """
    regions: dict[str, Region] = {}
    opaque: dict[str, str] = {}
    leaves: list[str] = []
    seen: set[nn.Module] = set()

    def visit(path: str, module: nn.Module) -> None:
        if module in seen or next(module.parameters(), None) is None:
            return
        seen.add(module)
        traced = _why_not(module, path) or _trace_region(module)
        if isinstance(traced, str) and is_builtin(module):
            leaves.append(path)
            inside = []
        elif isinstance(traced, str):
            opaque[path] = traced
            inside = [name for name, _ in module.named_children()]
        else:
            _check_names(module, path)
            regions[path] = traced
            inside = [name for name, leaf in called_modules(module, traced.graphs) if not is_builtin(leaf)]
        for name in inside:
            visit(f"{path}.{name}" if path else name, module.get_submodule(name))

    with _modes_kept(model):
        visit("", model)
    return Capture(regions, opaque, tuple(leaves))


def called_modules(module: nn.Module, graphs: dict[bool, fx.Graph]) -> list[tuple[str, nn.Module]]:
    """List the modules that a region's graphs call, each once, by their path inside the region."""
    targets = {str(n.target): None for graph in graphs.values() for n in graph.nodes if n.op == "call_module"}
    return [(target, module.get_submodule(target)) for target in targets]


def _why_not(module: nn.Module, path: str) -> str | None:
    """Say why one graph cannot stand for a module, before it is traced: nobody knows with which arguments it is called."""
    if "forward" in vars(module):
        return "its forward is replaced on the instance"
    parameters = inspect.signature(type(module).forward).parameters.values()
    optional = [p.name for p in parameters if p.default is not inspect.Parameter.empty]
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if optional and (path or len(required) < 2):  # of which `self` is one
        return f"which of its optional arguments it gets is not known ({', '.join(optional)})"
    return None


def _trace_region(module: nn.Module) -> Region | str:
    """Trace one module in both modes, or say why it cannot be."""
    before, graphs = Snapshot.of(module, rng_state()), {}
    inside = [(path, child, dict(vars(child))) for path, child in module.named_modules() if path]
    try:
        for mode in (True, False):
            for child in module.modules():
                vars(child)["training"] = mode
            graphs[mode] = _without_unread_attributes(_trace_graph(module, before))
    except Exception as error:
        _undo_writes(inside)
        before.restore(module)
        return f"{type(error).__name__}: {error}"
    constants = _constants(module, before)
    for name in constants:
        delattr(module, name)
    vars(module)["training"] = before.attributes["training"]
    if reason := _undo_writes(inside) or before.difference(module):
        before.restore(module)
        return reason
    if _facts(graphs[True]) == _facts(graphs[False]):
        graphs[False] = graphs[True]
    return Region(graphs, constants)


def _trace_graph(module: nn.Module, before: Snapshot) -> fx.Graph:
    """Trace a module in its mode; the graph calls Python functions that cannot be traced into as they are."""
    called: set[Callable[..., Any]] = set()
    while True:
        tracer, kept = _Tracer(before.rng, called), _constants(module, before)
        try:
            graph = tracer.trace(module)
        except Exception as error:
            tracer.refused |= _failing_function(error)
            if tracer.refused <= called:
                raise
        else:
            if tracer.refused <= called:
                return graph
        called |= tracer.refused
        for name in _constants(module, before).keys() - kept.keys():
            delattr(module, name)


def _failing_function(error: Exception) -> set[Callable[..., Any]]:
    """Find the function that a module's forward called and that raised; an empty set if the forward itself did."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for caller, callee in itertools.pairwise(frames):
        function: Any = caller.f_globals.get(callee.f_code.co_name)
        user = inspect.isfunction(function) and not function.__module__.startswith(("torch.", "passes."))
        if user and function.__code__ is callee.f_code and "self" in caller.f_locals:
            return {function}
    return set()


def _constants(module: nn.Module, before: Snapshot) -> dict[str, torch.Tensor]:
    """The tensors that tracing has put onto a module."""
    return {k: v for k, v in vars(module).items() if k not in before.attributes and isinstance(v, torch.Tensor)}


def _undo_writes(inside: list[tuple[str, nn.Module, dict[str, Any]]]) -> str | None:
    """Give the modules inside a region their attributes back, and say which had been written to."""
    reason = None
    for path, module, attributes in inside:
        now = vars(module)
        now["training"] = attributes["training"]
        if len(now) != len(attributes) or any(now.get(k) is not v for k, v in attributes.items()):
            now.clear()
            now.update(attributes)
            reason = reason or f"writes an attribute of its child {path!r}"
    return reason


def _facts(graph: fx.Graph) -> list[tuple[str, ...]]:
    return [(n.op, n.name, str(n.target), str(n.args), str(n.kwargs)) for n in graph.nodes]


def _without_unread_attributes(graph: fx.Graph) -> fx.Graph:
    # `tensor.shape` that only an error message mentions leaves a node that generated code would not reproduce.
    for node in [n for n in graph.nodes if n.target is getattr and not n.users]:
        graph.erase_node(node)
    return graph


@contextlib.contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            vars(module)["training"] = mode
