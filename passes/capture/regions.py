"""Regions: trace a model into one fx graph per mode.

An analysis: it finds the maximal regions that fx can trace and changes nothing. `passes.capture.captured.install` then makes
the model run the graphs.
"""

import inspect
import keyword
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from passes.capture.arguments import Arguments, arguments_of
from passes.capture.asking import answering
from passes.capture.copies import hooks_of
from passes.capture.effects import Snapshot, functions_of, modes_kept
from passes.capture.frames import failing_place
from passes.capture.leaves import is_builtin, is_container
from passes.capture.tracer import Tracer, failing_function

# What a module carries while it runs graphs: ours, and what fx's own tools read.
GRAPH_STATE = (
    *("_arguments", "_through", "_graphs", "_forwards", "_fuse", "keeps_graph"),
    *("meta", "shape_env", "_tracer_cls", "_tracer_extras"),
    *("_deepcopy_hooks", "_replace_hooks", "_create_node_hooks", "_erase_node_hooks"),
)
_RESERVED = frozenset(vars(fx.GraphModule)) - frozenset(vars(nn.Module)) | {
    *GRAPH_STATE,
    "ignore_later_hooks",
    "fuse_in_training",
}


def _taken_names(module: nn.Module) -> list[str]:
    """List what a module has under names that a module with graphs needs for itself."""
    own = {k for cls in type(module).__mro__ if not issubclass(nn.Module, cls) for k in vars(cls)}
    own |= vars(module).keys() | module._parameters.keys() | module._buffers.keys() | module._modules.keys()
    own -= {"__deepcopy__"} if is_parametrized(module) else set()  # torch's own, which copies as ours does
    if isinstance(module, fx.GraphModule):
        return []
    return sorted(_RESERVED & own - {"__new__", "__doc__", "__jit_unused_properties__"} - set(vars(nn.Module)))


@dataclass(frozen=True)
class Region:
    """A module that fx traces: one graph per mode, the same object where the modes do not differ.

    `constants` are the tensors that forward creates and the graphs read, by attribute name; `arguments` are those that the
    graphs hold for; `through` are the paths of the modules inside that the graphs show instead of calling them.
    """

    graphs: dict[bool, fx.Graph]  # {module.training: graph}
    constants: dict[str, torch.Tensor]
    arguments: Arguments
    through: tuple[str, ...] = ()


@dataclass(frozen=True)
class Capture:
    """What `trace` found, by module path.

    Attributes:
        regions: the modules that are graphs.
        opaque: the modules that stay Python code, each with the reason.
        leaves: torch.nn's own modules that such code calls, such as nn.GRU.
    """

    regions: dict[str, Region]
    opaque: dict[str, str]
    leaves: tuple[str, ...] = ()


def trace(model: nn.Module, blocks: Iterable[str] = (), python: Mapping[str, str] | None = None) -> Capture:
    """Trace the maximal traceable regions of a model; the model is left as it was.

    The whole model is one region (path "") where fx can trace it. A module whose Python code cannot be traced, or that
    does more than a graph can hold (draws random numbers, writes buffers, switches gradients off), stays a module; the search
    goes on inside it.

    Args:
        model: any module, on any device including meta.
        blocks: paths of modules that stay modules: a region each, which the graph around them calls.
        python: {path: reason} of modules that are to stay Python code.

    Returns:
        The regions and the reasons for what is not one.

    Example:
        >>> capture = trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
        >>> [node.name for node in capture.regions[""].graphs[True].nodes]
        ['input_1', '_0', '_1', 'output']
    """
    regions: dict[str, Region] = {}
    opaque: dict[str, str] = {}
    leaves: list[str] = []
    seen: set[nn.Module] = set()
    python = python or {}
    whole = frozenset(model.get_submodule(path) for path in (*blocks, *python))

    def visit(path: str, module: nn.Module) -> None:
        if module in seen or next(module.parameters(), None) is None:
            return
        seen.add(module)
        inside = [name for name, _ in module.named_children()]
        traced = python.get(path) or _why_not(module, path) or trace_region(module, whole - {module})
        if isinstance(traced, Region):
            regions[path] = traced
            inside = [name for name, leaf in called_modules(module, traced.graphs) if not is_builtin(leaf)]
        elif is_builtin(module):
            leaves.append(path)
            return
        elif not is_container(module) or module._parameters:
            opaque[path] = traced
        for name in inside:
            visit(f"{path}.{name}" if path else name, module.get_submodule(name))

    with modes_kept(model), answering(model):
        visit("", model)
    return Capture(regions, opaque, tuple(leaves))


def called_modules(module: nn.Module, graphs: dict[bool, fx.Graph]) -> list[tuple[str, nn.Module]]:
    """List the modules that a region's graphs call, each once, by their path inside the region."""
    targets = {str(n.target): None for graph in graphs.values() for n in graph.nodes if n.op == "call_module"}
    return [(target, module.get_submodule(target)) for target in targets]


def _why_not(module: nn.Module, path: str) -> str | None:
    """Say why one graph cannot stand for a module, before it is traced."""
    if is_container(module):
        return "it has no forward: other code reads it"
    if "forward" in vars(module):
        return "its forward is replaced on the instance"
    if taken := _taken_names(module):
        return f"a module with graphs needs for itself what it has under the names {', '.join(taken)}"
    parameters = inspect.signature(type(module).forward).parameters.values()
    optional = [p.name for p in parameters if p.default is not inspect.Parameter.empty]
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if optional and (path or len(required) < 2):  # `self` is among them
        return f"which of its optional arguments it gets is not known ({', '.join(optional)})"
    return None


def trace_region(module: nn.Module, blocks: frozenset[nn.Module] = frozenset()) -> Region | str:
    """Trace one module in both modes, or say why it cannot be; `modes_kept` and `answering` are to be entered before."""
    state, reason = Snapshot(module.modules(), hooks_of(module)), None
    for careful in (False, True):  # the second time finds what inside the module changes the state
        traced = _trace_modes(module, state, blocks, careful)
        if isinstance(traced, str):
            return traced
        reason = state.difference()
        if reason is None:
            return traced
        state.restore()
    return f"it {reason}"


def _trace_modes(module: nn.Module, state: Snapshot, blocks: frozenset[nn.Module], careful: bool) -> Region | str:
    graphs, tracers, constants = {}, [], {}
    own = dict(vars(module))
    try:
        for mode in (True, False):
            for child in module.modules():
                vars(child)["training"] = mode
            graphs[mode], tracer = _trace_graph(module, state, blocks, careful)
            tracers.append(tracer)
            _drop_unread_attributes(graphs[mode])
    except Exception as error:
        state.restore()
        where = failing_place(error)
        return f"{error if str(error).startswith('it ') else f'{type(error).__name__}: {error}'}" + f" ({where})" * bool(where)
    finally:
        constants = _take_constants(module, own)
    if words := _reserved_words(graphs.values()):
        return f"generated code cannot read what is named by words of Python's own, {', '.join(sorted(words))}"
    if _facts(graphs[True]) == _facts(graphs[False]):
        graphs[False] = graphs[True]
    through = sorted({path for tracer in tracers for path in tracer.through})
    code = [f for path in ("", *through) for cls in type(module.get_submodule(path)).__mro__ for f in functions_of(cls)]
    assumed = {name for tracer in tracers for name in tracer.assumed}
    return Region(graphs, constants, arguments_of(type(module).forward, assumed, code), tuple(through))


def _trace_graph(module: nn.Module, state: Snapshot, blocks: frozenset[nn.Module], careful: bool) -> tuple[fx.Graph, Tracer]:
    """Trace a module in its mode; the graph calls Python functions that cannot be traced into as they are."""
    called: set[Callable[..., Any]] = set()
    while True:
        tracer, own = Tracer(state, called, blocks, careful), dict(vars(module))
        try:
            graph = tracer.trace(module)
        except Exception as error:
            tracer.refused |= failing_function(error)
            if tracer.refused <= called:
                raise
        else:
            if tracer.refused <= called:
                return graph, tracer
        called |= tracer.refused
        _take_constants(module, own)


def _reserved_words(graphs: Iterable[fx.Graph]) -> set[str]:
    paths = [str(n.target) for graph in graphs for n in graph.nodes if n.op in ("call_module", "get_attr")]
    return {part for path in paths for part in path.split(".") if keyword.iskeyword(part)}


def _take_constants(module: nn.Module, own: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Take the tensors that tracing has put onto a module off it, and return them."""
    found = {k: v for k, v in vars(module).items() if k not in own and isinstance(v, torch.Tensor)}
    for name in found:
        delattr(module, name)
    return found


def _facts(graph: fx.Graph) -> list[tuple[str, ...]]:
    return [(n.op, n.name, str(n.target), str(n.args), str(n.kwargs)) for n in graph.nodes]


def _drop_unread_attributes(graph: fx.Graph) -> None:
    # `tensor.shape` that only an error message mentions leaves a node that generated code would not reproduce.
    for node in [n for n in graph.nodes if n.target is getattr and not n.users]:
        graph.erase_node(node)
