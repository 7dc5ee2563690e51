"""Inline: what modules without parameters do, in the graph that called them, so that the kernels may know it."""

from collections.abc import Mapping

from torch import fx, nn

from passes.capture.asking import answering
from passes.capture.effects import modes_kept
from passes.capture.leaves import has_hooks, is_builtin
from passes.capture.regions import Region, trace_region

_FUNCTIONS = ("placeholder", "call_function", "call_method", "output")


def inline_(model: nn.Module, graphs: Mapping[str, fx.Graph]) -> None:
    """Put the operations of modules that only call functions in place of calls of them.

    Args:
        model: in evaluation mode, which the graphs hold for from now on.
        graphs: of its regions, by path; they are changed.
    """
    shown: dict[nn.Module, fx.Graph | None] = {}
    with modes_kept(model), answering(model):
        for path, graph in graphs.items():
            for node in [n for n in graph.nodes if n.op == "call_module"]:
                layer = model.get_submodule(path).get_submodule(str(node.target))
                if layer not in shown:
                    shown[layer] = _functions_of(layer)
                _inline(node, shown[layer])


def _functions_of(layer: nn.Module) -> fx.Graph | None:
    """Return a graph of functions and methods that does what a module does in evaluation mode, if there is one."""
    if is_builtin(layer) or has_hooks(layer) or [*layer.parameters(), *layer.buffers()]:
        return None
    region = trace_region(layer)
    if not isinstance(region, Region) or region.constants:
        return None
    graph = region.graphs[False]
    return graph if all(node.op in _FUNCTIONS for node in graph.nodes) else None


def _inline(call: fx.Node, inside: fx.Graph | None) -> None:
    given = [node for node in inside.nodes if node.op == "placeholder"] if inside else []
    # One with a default holds for that default only.
    if inside is None or call.kwargs or len(given) != len(call.args) or any(node.args for node in given):
        return
    values = {node: value for node, value in zip(given, call.args, strict=True) if isinstance(value, fx.Node)}
    if len(values) != len(given):
        return
    with call.graph.inserting_before(call):
        result = call.graph.graph_copy(inside, values)
    if isinstance(result, fx.Node):
        call.replace_all_uses_with(result)
        call.graph.erase_node(call)
