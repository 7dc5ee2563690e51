"""Segments: the parts of a graph that the kernels run, each as one operator call, where that is faster."""

import heapq
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from passes.capture.captured import is_there
from passes.counting.recorder import thawed
from passes.lowering.build import build
from passes.lowering.grouping import groups_of
from passes.lowering.operation import Operation
from passes.lowering.operations import operation_of, overwrites
from passes.lowering.program import SUMS
from passes.lowering.segment import Segment
from passes.torch_ops import is_view


def cut(module: nn.Module, graph: fx.Graph) -> list[tuple[list[fx.Node], dict[fx.Node, Operation]]]:
    """Return the parts of a graph that the kernels can run: maximal sets of nodes that nothing outside lies between.

    Args:
        module: the root of the graph.
        graph: on whose nodes shapes are known.

    Returns:
        The nodes of each part in order, and what they are. Parts without a convolution or linear layer are left out.
    """
    changing = _changing(module, graph)
    known = {node: found for node in graph.nodes if (found := operation_of(module, node))}
    known = {node: found for node, found in known.items() if not changing & {node, *node.all_input_nodes}}
    groups = groups_of(graph, known)
    return [(nodes, known) for nodes in groups if any(known[node].kind in SUMS for node in nodes)]


def _changing(module: nn.Module, graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose values others overwrite: when they are read matters."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        sources = node.all_input_nodes if overwrites(module, node) else []
        while sources:
            found.update(sources)
            sources = [n for source in sources if is_view(source) for n in source.all_input_nodes[:1]]
    return found


@dataclass(frozen=True)
class Part:
    """A part of a graph as a program.

    Attributes:
        nodes: what it stands for.
        inputs, outputs: the nodes whose values go in and come out.
        segment: what runs it.
    """

    nodes: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    segment: Segment


def part_of(nodes: list[fx.Node], known: Mapping[fx.Node, Operation]) -> Part:
    """Return nodes as a part."""
    own = set(nodes)
    outputs = [node for node in nodes if any(user not in own for user in node.users)]
    program, constants, inputs = build(nodes, known, outputs)
    shapes = [node.meta["tensor_meta"].shape for node in inputs]
    return Part(nodes, inputs, outputs, Segment(program, constants, shapes))


def replace_(module: nn.Module, graph: fx.Graph, parts: Sequence[Part]) -> None:
    """Put calls of segments in place of parts, in place; segments are put onto the module, and their layers taken off.

    Args:
        module: the root of the graph.
        graph: it is changed.
        parts: of the graph, none within another.
    """
    places = {node: number for number, node in enumerate(graph.nodes)}
    now: dict[fx.Node, fx.Node] = {}  # what has taken the place of the results of parts
    for number, part in enumerate(parts):
        name = f"segment_{number}"
        module.add_module(name, part.segment)
        inputs = tuple(now.get(node, node) for node in part.inputs)
        with graph.inserting_after(inputs[-1]):
            call = graph.create_node("call_module", name, inputs)
        places[call] = places[part.nodes[-1]]
        for place, node in enumerate(part.outputs):
            result = call
            if len(part.outputs) > 1:
                with graph.inserting_after(call):
                    result = graph.call_function(operator.getitem, (call, place))
            result.meta, places[result], now[node] = dict(node.meta), places[part.nodes[-1]], result
            node.replace_all_uses_with(result, lambda user, own=frozenset(part.nodes): user not in own)
        for node in reversed(part.nodes):
            graph.erase_node(node)
    _sort(graph, places)
    _take_off(module, graph)


def _take_off(module: nn.Module, graph: fx.Graph) -> None:
    """Delete the layers that no graph of the module calls any more, and the parameters of its own that it no longer reads."""
    for node in [n for n in graph.nodes if n.op == "get_attr" and not n.users]:
        graph.erase_node(node)
        module._parameters.pop(str(node.target), None)
    called = {str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")}
    for path, _ in [*module.named_modules()]:
        inside = any(target == path or target.startswith(f"{path}.") or path.startswith(f"{target}.") for target in called)
        if path and not inside and is_there(module, path):
            parent, _, name = path.rpartition(".")
            delattr(module.get_submodule(parent), name)


def _sort(graph: fx.Graph, place: Mapping[fx.Node, int]) -> None:
    """Put every node after those that it reads, and otherwise in the order of their places."""
    waiting = {node: len(node.all_input_nodes) for node in graph.nodes}
    ready = [(place[node], number, node) for number, node in enumerate(graph.nodes) if not waiting[node]]
    heapq.heapify(ready)
    last, count = None, len(waiting)
    while ready:
        _, _, node = heapq.heappop(ready)
        if last is not None and last.next is not node:
            last.append(node)
        last = node
        for user in node.users:
            waiting[user] -= 1
            if not waiting[user]:
                count += 1
                heapq.heappush(ready, (place[user], count, user))


class Shapes(fx.Interpreter):
    """Runs a graph, and writes to every node what shape and number format its value has."""

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and remember."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        result = getattr(self, n.op)(n.target, thawed(args), thawed(kwargs))
        if isinstance(result, torch.Tensor):
            n.meta["tensor_meta"] = result.to("meta")
        return result


def learn_shapes(module: nn.Module, graph: fx.Graph, inputs: Sequence[Any]) -> None:
    """Run a graph once, so that `shape_of` knows the shapes of its values."""
    with torch.no_grad():
        Shapes(module, graph=graph).run(*inputs)
