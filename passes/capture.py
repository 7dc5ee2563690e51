"""Capture: trace a model into one fx graph per mode.

An analysis: it finds the maximal regions that fx can trace and changes nothing. `passes.captured.install` then makes
the model run the graphs.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from passes.effects import Snapshot, rng_state
from passes.tracer import Tracer, failing_function, is_builtin

_RESERVED = frozenset(vars(fx.GraphModule)) - frozenset(vars(nn.Module)) | {"meta"}


def _check_names(module: nn.Module, path: str) -> None:
    own = {k for cls in type(module).__mro__ if not issubclass(nn.Module, cls) for k in vars(cls)}
    own |= vars(module).keys() | module._parameters.keys() | module._buffers.keys() | module._modules.keys()
    own -= {"__deepcopy__"} if is_parametrized(module) else set()  # torch's own, which copies as ours does
    if not isinstance(module, fx.GraphModule) and (
        taken := sorted(_RESERVED & own - {"__new__", "__doc__", "__jit_unused_properties__"} - set(vars(nn.Module)))
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


def trace(model: nn.Module, blocks: Iterable[str] = ()) -> Capture:
    """Trace the maximal traceable regions of a model; the model is left as it was.

    The whole model is one region (path "") where fx can trace it. A module whose Python code cannot be traced, or that
    does more than a graph can hold (draws random numbers, writes buffers), stays a module; the search goes on inside it.

    Args:
        model: any module, on any device including meta.
        blocks: paths of modules that stay modules: a region each, which the graph around them calls.

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
    whole = frozenset(model.get_submodule(path) for path in blocks)

    def visit(path: str, module: nn.Module) -> None:
        if module in seen or next(module.parameters(), None) is None:
            return
        seen.add(module)
        traced = _why_not(module, path) or _trace_region(module, whole)
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


def _trace_region(module: nn.Module, blocks: frozenset[nn.Module]) -> Region | str:
    """Trace one module in both modes, or say why it cannot be."""
    before, graphs = Snapshot.of(module, rng_state()), {}
    inside = [(path, child, dict(vars(child))) for path, child in module.named_modules() if path]
    try:
        for mode in (True, False):
            for child in module.modules():
                vars(child)["training"] = mode
            graphs[mode] = _without_unread_attributes(_trace_graph(module, before, blocks))
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


def _trace_graph(module: nn.Module, before: Snapshot, blocks: frozenset[nn.Module]) -> fx.Graph:
    """Trace a module in its mode; the graph calls Python functions that cannot be traced into as they are."""
    called: set[Callable[..., Any]] = set()
    while True:
        tracer, kept = Tracer(before.rng, called, blocks), _constants(module, before)
        try:
            graph = tracer.trace(module)
        except Exception as error:
            tracer.refused |= failing_function(error)
            if tracer.refused <= called:
                raise
        else:
            if tracer.refused <= called:
                return graph
        called |= tracer.refused
        for name in _constants(module, before).keys() - kept.keys():
            delattr(module, name)


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
