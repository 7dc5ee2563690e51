"""Capture: trace a model into one fx graph per mode, and make the model run those graphs.

`trace` is an analysis: it finds the maximal regions that fx can trace and changes nothing. `install` gives every region
the class `Captured`, which is both an `fx.GraphModule` and the module's own class.
"""

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph_module import _forward_from_src, _format_import_block
from torch.package import sys_importer

from passes.effects import Snapshot

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_RESERVED = frozenset(vars(fx.GraphModule)) - frozenset(vars(nn.Module)) | {"meta"}
_UNPICKLED = ("_graphs", "_forwards", "_code")


def is_builtin(module: nn.Module) -> bool:
    """Tell whether fx keeps `module` whole: a module that torch.nn defines, other than nn.Sequential."""
    return type(module).__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(module, nn.Sequential)


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
    """Traces with optional arguments at their defaults; calls whole whatever it cannot trace faithfully."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or is_called_whole(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        last, before = next(iter(reversed(self.graph.nodes)), None), Snapshot.of(m)
        try:
            result = super().call_module(m, forward, args, kwargs)
            if before.difference(m) is None:
                return result
        except Exception:  # noqa: S110 - whatever the user's code raises on a Proxy: `trace` goes on inside and says why
            pass
        before.restore(m)
        self._erase_after(last)
        return self.create_proxy("call_module", path, args, kwargs)

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


@dataclass(frozen=True)
class Region:
    """A module that fx traces: one graph per mode, the same object where the modes do not differ.

    `constants` are the tensors that forward creates and the graphs read, by attribute name.
    """

    graphs: dict[bool, fx.Graph]  # {module.training: graph}
    constants: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Capture:
    """What `trace` found: `regions` by module path, and for every module kept as Python code the reason."""

    regions: dict[str, Region]
    opaque: dict[str, str]


def trace(model: nn.Module) -> Capture:
    """Trace the maximal traceable regions of a model; the model is left as it was.

    The whole model is one region (path "") where fx can trace it. A module whose Python code cannot be traced, or that
    does more than a graph can hold (draws random numbers, writes buffers), stays a module; the search goes on inside it.

    Args:
        model: any module, on any device including meta.

    Returns:
        The regions and the reasons for what is not one.

    Example:
        >>> capture = trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
        >>> [node.name for node in capture.regions[""].graphs[True].nodes]
        ['input_1', '_0', '_1', 'output']
    """
    regions: dict[str, Region] = {}
    opaque: dict[str, str] = {}
    seen: set[nn.Module] = set()

    def visit(path: str, module: nn.Module) -> None:
        if module in seen or next(module.parameters(), None) is None:
            return
        seen.add(module)
        traced = _trace_region(module)
        if isinstance(traced, str):
            opaque[path] = traced
            inside = [name for name, _ in module.named_children()]
        else:
            regions[path] = traced
            inside = [name for name, leaf in called_modules(module, traced.graphs) if not is_builtin(leaf)]
        for name in inside:
            visit(f"{path}.{name}" if path else name, module.get_submodule(name))

    with _modes_kept(model):
        visit("", model)
    return Capture(regions, opaque)


def called_modules(module: nn.Module, graphs: dict[bool, fx.Graph]) -> list[tuple[str, nn.Module]]:
    """List the modules that a region's graphs call, each once, by their path inside the region."""
    targets = {str(n.target): None for graph in graphs.values() for n in graph.nodes if n.op == "call_module"}
    return [(target, module.get_submodule(target)) for target in targets]


def _trace_region(module: nn.Module) -> Region | str:
    """Trace one module in both modes, or say why it cannot be."""
    if "forward" in vars(module):
        return "its forward is replaced on the instance"
    before, graphs = Snapshot.of(module), {}
    try:
        for mode in (True, False):
            for child in module.modules():
                vars(child)["training"] = mode
            graphs[mode] = _without_unread_attributes(_Tracer().trace(module))
    except Exception as error:
        before.restore(module)
        return f"{type(error).__name__}: {error}"
    constants = {k: v for k, v in vars(module).items() if k not in before.attributes and isinstance(v, torch.Tensor)}
    for name in constants:
        delattr(module, name)
    vars(module)["training"] = before.attributes["training"]
    if reason := before.difference(module):
        before.restore(module)
        return reason
    if _facts(graphs[True]) == _facts(graphs[False]):
        graphs[False] = graphs[True]
    return Region(graphs, constants)


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


class Captured(fx.GraphModule):
    """A module that runs its graphs: an `fx.GraphModule` with one graph per mode, and its own class besides.

    `graph`, `code` and everything fx does with them are those of the current mode; assigning `graph` replaces that of
    the current mode, or of both while they are one. `forward` chooses between two fixed functions by `self.training`,
    so that `torch.compile` and pickling see both.
    """

    _graphs: dict[bool, fx.Graph]
    _forwards: dict[bool, Callable[..., Any]]

    @property
    def _graph(self) -> fx.Graph:  # what GraphModule's own property `graph` reads and writes
        return self._graphs[self.training]

    @_graph.setter
    def _graph(self, graph: fx.Graph) -> None:
        shared = self._graphs[True] is self._graphs[False]
        self._graphs = {True: graph, False: graph} if shared else {**self._graphs, self.training: graph}

    @property
    def code(self) -> str:
        """The Python source of the current mode's forward."""
        return self._graph.python_code("self").src

    def recompile(self) -> Any:
        """Generate forward again, in both modes, after a graph was edited."""
        codes = {graph: graph.python_code("self") for graph in dict.fromkeys(self._graphs.values())}
        forwards = {graph: _forward_from_src(code.src, code.globals) for graph, code in codes.items()}
        self._forwards = {mode: forwards[graph] for mode, graph in self._graphs.items()}
        return codes[self._graph]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Captured":
        result = nn.Module.__new__(type(self))
        memo[id(self)] = result
        vars(result).update(copy.deepcopy(vars(self), memo))
        for graph in result._graphs.values():
            graph.owning_module = result
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        # As GraphModule does: generated code is stored and traced again on loading, graphs are not.
        state = {k: v for k, v in vars(self).items() if k not in _UNPICKLED}
        sources = {mode: _source(graph) for mode, graph in self._graphs.items()}
        return _new_captured, (user_class(self),), (state, sources)

    def __setstate__(self, state: tuple[dict[str, Any], dict[bool, tuple[str, list[str]]]]) -> None:
        attributes, sources = state
        super().__setstate__(attributes)
        graphs = {source[0]: _graph_of(self, *source) for source in sources.values()}
        _set_graphs(self, {mode: graphs[source[0]] for mode, source in sources.items()})


def user_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a captured module had before."""
    return type(module).__bases__[1]


@functools.cache
def _captured_class(base: type[nn.Module]) -> type[Captured]:
    @functools.wraps(base.forward)
    def forward(self: Captured, *args: Any, **kwargs: Any) -> Any:
        return self._forwards[self.training](self, *args, **kwargs)

    return type(base.__name__, (Captured, base), {"forward": forward, "__doc__": base.__doc__, "__module__": base.__module__})


def _new_captured(base: type[nn.Module]) -> Captured:
    return nn.Module.__new__(_captured_class(base))


def _source(graph: fx.Graph) -> tuple[str, list[str]]:
    code = graph.python_code("self")
    return _format_import_block(code.globals, sys_importer) + code.src, [node.name for node in graph.nodes]


class _SourceTracer(fx.Tracer):
    """Traces generated code: every module is called whole, every buffer is read by a node."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _graph_of(module: nn.Module, source: str, names: list[str]) -> fx.Graph:
    holder = type("Source", (nn.Module,), {"forward": _forward_from_src(source, {})})
    root = nn.Module.__new__(holder)
    vars(root).update(vars(module))
    graph = _SourceTracer().trace(root)
    if len(names) == len(graph.nodes):
        for node, name in zip(graph.nodes, names, strict=True):
            node._rename(name)
    return graph


def _set_graphs(module: Captured, graphs: dict[bool, fx.Graph]) -> None:
    module._graphs = graphs
    for graph in graphs.values():
        graph.owning_module = module
    module.recompile()


def install(model: nn.Module, capture: Capture) -> nn.Module:
    """Make a model run its captured graphs, in place.

    Args:
        model: the module that `capture` was traced from.
        capture: what `trace` found.

    Returns:
        The same object; every region is now `Captured`.

    Raises:
        ValueError: a region has attributes that `fx.GraphModule` needs for itself. Nothing was changed.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3))
        >>> isinstance(install(model, trace(model)), fx.GraphModule)
        True
    """
    for path in capture.regions:
        _check_names(model.get_submodule(path), path)
    for path, region in capture.regions.items():
        module = model.get_submodule(path)
        for name, constant in region.constants.items():
            module.register_buffer(name, constant, persistent=False)
        module.__class__ = _captured_class(type(module))
        # What GraphModule.__init__ would set; fx's own tools read these.
        vars(module).update(meta={}, shape_env=None, _tracer_cls=None, _tracer_extras={}, _deepcopy_hooks=[])
        vars(module).update(_replace_hooks=[], _create_node_hooks=[], _erase_node_hooks=[])
        _set_graphs(module, region.graphs)
    return model


def _check_names(module: nn.Module, path: str) -> None:
    own = {k for cls in type(module).__mro__ if not issubclass(nn.Module, cls) for k in vars(cls)}
    own |= vars(module).keys() | module._parameters.keys() | module._buffers.keys() | module._modules.keys()
    if not isinstance(module, fx.GraphModule) and (taken := sorted(_RESERVED & own - {"__new__", "__doc__"} - set(vars(nn.Module)))):
        raise ValueError(
            f"{path or type(module).__name__!r} has attributes that fx.GraphModule needs for itself: {', '.join(taken)}. "
            f"Rename them in the model."
        )


def graphs(model: nn.Module) -> dict[str, fx.Graph]:
    """Return the graph of every captured region, in the current mode.

    Args:
        model: a model that `sparsify` returned.

    Returns:
        {module path: graph}; the path of the whole model is "".
    """
    return {path: module.graph for path, module in model.named_modules() if isinstance(module, Captured)}
