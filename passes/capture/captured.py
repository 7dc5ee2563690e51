"""Captured: a module that runs its graphs, one per mode, and is an `fx.GraphModule` and its own class at once."""

import copy
import functools
import operator
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import fx, nn
from torch.fx.graph_module import _format_import_block, _forward_from_src
from torch.package.importer import sys_importer

from passes.capture.arguments import Arguments
from passes.capture.host import Guest, Host, container_methods, run_graph, run_reading
from passes.capture.leaves import has_hooks
from passes.capture.regions import Capture
from passes.capture.tracer import TypedTracer

_OWN = ("_compiled_call_impl",)  # what Module.compile() made calls this module, and no copy of it
_UNPICKLED = ("_graphs", "_forwards", *_OWN)


class Captured(Host, fx.GraphModule):
    """A module that runs its graphs: an `fx.GraphModule` with one graph per mode, and its own class besides.

    `graph`, `code` and everything fx does with them are those of the current mode; assigning `graph` replaces that of
    the current mode, or of both while they are one. `forward` chooses between two fixed functions by `self.training`,
    so that `torch.compile` and pickling see both. For a call that the graphs do not hold for (other kinds of arguments,
    hooks or modes of modules that they do not call), the module's own Python code runs, on the masked weights.
    """

    _graphs: dict[bool, fx.Graph]
    _forwards: dict[bool, Callable[..., Any]]
    _arguments: Arguments
    _through: tuple[nn.Module, ...]  # that the graphs show instead of calling them
    _lineno_map: ClassVar[dict[int, int]] = {}  # dynamo asks which nodes the lines of `forward` are: none

    def ignore_later_hooks(self) -> None:
        """Go on running graphs when hooks are added later to modules that the graphs do not call."""
        if not any(map(has_hooks, self._through)):
            vars(self)["_through"] = ()

    def layers_changed(self) -> None:
        """Run the graphs as they are now, after layers were put in and taken off."""
        left = set(self.modules())
        vars(self)["_through"] = tuple(module for module in self._through if module in left)
        self.recompile()

    @property
    def _graph(self) -> fx.Graph:  # what GraphModule's own property `graph` reads and writes
        return self._graphs[self.training]

    @_graph.setter
    def _graph(self, graph: fx.Graph) -> None:
        shared = self._graphs[True] is self._graphs[False]
        self._graphs = {True: graph, False: graph} if shared else {**self._graphs, self.training: graph}

    @property
    def _code(self) -> str:  # likewise for `code`, and for printing
        return self._graph.python_code("self").src

    def recompile(self) -> Any:
        """Generate forward again, in both modes, after a graph was edited."""
        fuse = vars(self).get("_fuse")
        graphs = {mode: fuse(graph, self) if fuse and mode else graph for mode, graph in self._graphs.items()}
        codes = {graph: graph.python_code("self") for graph in dict.fromkeys(graphs.values())}
        forwards = {graph: _forward_from_src(code.src, code.globals) for graph, code in codes.items()}
        self._forwards = {mode: forwards[graph] for mode, graph in graphs.items()}
        return codes[graphs[self.training]]

    def fuse_in_training(self, fuse: Callable[[fx.Graph, nn.Module], fx.Graph] | None) -> None:
        """Run in training what `fuse` makes of the graph; `graph` and `code` stay as they are. None runs the graph."""
        vars(self)["_fuse"] = fuse
        self.recompile()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Captured":
        result = nn.Module.__new__(type(self))
        memo[id(self)] = result
        vars(result).update(copy.deepcopy({k: v for k, v in vars(self).items() if k not in _OWN}, memo))
        for mode, graph in result._graphs.items():
            if graph is not self._graphs[mode]:  # `memo` may say that the graphs are shared
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


def _holds(module: Captured, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the graphs of a module stand for a call of it."""
    if not module._arguments.fit(args, kwargs):
        return False
    if torch.compiler.is_compiling():
        return True
    by_mode = module._graphs[True] is not module._graphs[False]
    mixed = by_mode and any(inner.training is not module.training for inner in module._through)
    return not mixed and not any(map(has_hooks, module._through))


def _run_python(module: Captured, base: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a module's own code, unless its graphs do what that code does not."""
    if vars(module).get("keeps_graph") or any(_masks_computed(module, node) for node in module.graph.nodes):
        raise ValueError(
            f"{base.__name__} is a graph, which holds for calls with tensors and its optional arguments at their defaults, and "
            f"for modules inside it without hooks and in its own mode. Its Python code cannot stand in, since the graph masks "
            f"weights after they are transformed, or is narrower."
        )
    return run_reading(base.forward, module, *args, **kwargs)


def _masks_computed(module: Captured, node: fx.Node) -> bool:
    """Whether a node hands a guest what was computed from a weight, which Python code reads without the guest."""
    called = node.op == "call_module" and is_there(module, str(node.target))
    guest = called and isinstance(module.get_submodule(str(node.target)), Guest)
    return guest and node.all_input_nodes[0].op != "get_attr"


def user_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a captured module had before."""
    return type(module).__bases__[1]


@functools.cache
def _captured_class(base: type[nn.Module]) -> Any:
    @functools.wraps(base.forward)
    def forward(self: Captured, *args: Any, **kwargs: Any) -> Any:
        if _holds(self, args, kwargs):
            try:
                return run_graph(self._forwards[self.training], self, *args, **kwargs)
            except AttributeError as error:
                _explain_missing(self, error)
                raise
        return _run_python(self, base, args, kwargs)

    own = {"forward": forward, "__doc__": base.__doc__, "__module__": base.__module__}
    return type(base.__name__, (Captured, base), own | container_methods(base))


def _explain_missing(module: Captured, error: AttributeError) -> None:
    """Raise if a graph reads a layer that has been taken off its module since."""
    for node in [n for n in module.graph.nodes if n.op in ("call_module", "get_attr")]:
        if not is_there(module, str(node.target)):
            raise RuntimeError(
                f"{node.target} was there when sparsify() traced the model, and is gone. Change layers (fuse, delete, replace) "
                f"before sparsify(), or in the dense model that fold() returns, or let the modules around them be called as "
                f"modules, by sparsify(..., blocks=[...])."
            ) from error


def is_there(module: nn.Module, path: str) -> bool:
    """Whether a module has an attribute, or a module inside it, at a path."""
    try:
        operator.attrgetter(path)(module)
    except AttributeError:
        return False
    return True


def _new_captured(base: type[nn.Module]) -> Captured:
    return nn.Module.__new__(_captured_class(base))


def _source(graph: fx.Graph) -> tuple[str, list[str]]:
    code = graph.python_code("self")
    return _format_import_block(code.globals, sys_importer) + code.src, [node.name for node in graph.nodes]


class _SourceTracer(TypedTracer):
    """Traces generated code: every module is called whole."""

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


def _set_graphs(module: Any, graphs: dict[bool, fx.Graph]) -> None:
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

    Example:
        >>> from passes.capture.regions import trace
        >>> model = nn.Sequential(nn.Linear(2, 3))
        >>> isinstance(install(model, trace(model)), fx.GraphModule)
        True
    """
    for path, region in capture.regions.items():
        module = model.get_submodule(path)
        for name, constant in region.constants.items():
            module.register_buffer(name, constant, persistent=False)
        module.__class__ = _captured_class(user_class(module) if isinstance(module, Captured) else type(module))
        # What GraphModule.__init__ would set; fx's own tools read these.
        vars(module).update(
            _arguments=region.arguments,
            _through=tuple(module.get_submodule(inner) for inner in region.through),
            meta={},
            shape_env=None,
            _tracer_cls=None,
            _tracer_extras={},
            _deepcopy_hooks=[],
        )
        vars(module).update(_replace_hooks=[], _create_node_hooks=[], _erase_node_hooks=[])
        _set_graphs(module, region.graphs)
    return model


def graphs(model: nn.Module) -> dict[str, fx.Graph]:
    """Return the graph of every captured region, in the current mode.

    Args:
        model: a model that `sparsify` returned.

    Returns:
        {module path: graph}; the path of the whole model is "".
    """
    return {path: module.graph for path, module in model.named_modules() if isinstance(module, Captured)}
