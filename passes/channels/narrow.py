"""Narrow: the same architecture with fewer channels, worked out on the model's own graph.

Every layer takes as many inputs as its narrowed producers hand it, through residuals, groups and concatenations alike, and
gives as many outputs as one function of the original number says. Equal sizes thus stay equal, which is all that an addition
needs.
"""

import copy
import inspect
import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from passes.capture.captured import install
from passes.capture.regions import trace
from passes.channels.layer_sizes import apply_sizes, narrowed_parameter, sizes_of
from passes.channels.widths import Narrowing, NarrowingInterpreter, Width, fed_nodes, is_triple, parameter_of


class Narrowable:
    """A model whose graphs can be run at any width.

    Args:
        model: any module that traces whole; it is not changed.
        inputs: positional arguments of forward; only their shapes count.

    Raises:
        ValueError: the model does not trace whole.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.model = model
        self.capture = trace(model)
        if "" not in self.capture.regions:
            raise ValueError(
                f"{type(model).__name__} does not trace whole, so its channels cannot be followed: "
                f"{'; '.join(self.capture.opaque.values())}"
            )
        self._meta = copy.deepcopy(model).to("meta").eval()
        self._inputs = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), inputs)
        self._graphs = list(dict.fromkeys(self.capture.regions[""].graphs.values()))
        self._last = {node for graph in self._graphs for node in _last_layers(graph, self._meta)}
        self._outputs = self._run(lambda size: size, Narrowing())
        self.sizes = self._find_sizes()
        while leaking := self._outputs_that_shrink():
            self.sizes = {size: multiple for size, multiple in self.sizes.items() if size not in leaking}

    def narrowing(self, width: Width) -> Narrowing:
        """Work out what the model becomes at a width.

        Args:
            width: called with the sizes in `self.sizes`; its result must be a multiple of what they say.

        Raises:
            ValueError: a node cannot follow; the message names it.
        """
        result = Narrowing()
        if self._run(lambda size: width(size) if size in self.sizes else size, result) != self._outputs:
            raise ValueError("The narrowed model's outputs have other shapes: an output layer could not be told apart.")
        return result

    def apply(self, narrowing: Narrowing) -> nn.Module:
        """Return the narrowed model: weights thinned out evenly, and scaled up to the smaller fan-in."""
        model = copy.deepcopy(self.model)
        capture = trace(model)
        for old, new in zip(self._graphs, dict.fromkeys(capture.regions[""].graphs.values()), strict=True):
            for node, copied in zip(old.nodes, new.nodes, strict=True):
                if node in narrowing.constants:
                    by_name = {n.name: n for n in new.nodes}
                    copied.args = fx.map_arg(narrowing.constants[node], lambda n, by_name=by_name: by_name[n.name])
        by_original: dict[Any, Any] = {}  # so that tied weights stay tied
        for path, layer in narrowing.layers.items():
            apply_sizes(model.get_submodule(path), layer, by_original)
        for name, shape in narrowing.parameters.items():
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(owner)
            module._parameters[attribute] = narrowed_parameter(module._parameters[attribute], shape, module)
        model = install(model, capture)
        vars(model)["keeps_graph"] = True  # the original forward may hold the original sizes
        return model

    def _run(self, width: Width, narrowing: Narrowing) -> list[Any]:
        shapes = []
        for graph in self._graphs:
            with torch.no_grad():
                outputs = NarrowingInterpreter(self._meta, self.capture, graph, width, narrowing, self._last).run(*self._inputs)
            shapes.append([tuple(t.shape) for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)])
        return shapes

    def _find_sizes(self) -> dict[int, int]:
        """List the sizes that may shrink, each with the number that its new one must be a multiple of."""
        sizes: dict[int, int] = {}
        nodes = [node for graph in self._graphs for node in fed_nodes(graph)]
        for node in nodes:
            for size, multiple in [] if node in self._last else _sizes_at(node, self._meta):
                sizes[size] = math.lcm(sizes.get(size, 1), multiple)
        for node in nodes:
            for size, multiple in _heads_at(node, sizes):
                sizes[size] = math.lcm(sizes[size], multiple)
        return {size: multiple for size, multiple in sizes.items() if size > multiple}

    def _outputs_that_shrink(self) -> set[int]:
        """Return the sizes that show in the model's outputs: those of output layers, which have to stay."""
        narrowed = self._run(lambda size: self.sizes.get(size, size), Narrowing())
        shapes = zip(itertools.chain(*self._outputs), itertools.chain(*narrowed), strict=True)
        changed = {old for before, after in shapes for old, new in zip(before, after, strict=True) if old != new}
        return changed & set(self.sizes)


def _last_layers(graph: fx.Graph, model: nn.Module) -> set[fx.Node]:
    """Return the layers that decide the sizes of the graph's outputs, by going back from these; they keep their outputs."""
    last, left = set(), list(next(iter(reversed(graph.nodes))).all_input_nodes)
    seen = set(left)
    while left:
        node = left.pop()
        if _sizes_at(node, model):
            last.add(node)
            continue
        left += [n for n in node.all_input_nodes if n not in seen]
        seen.update(node.all_input_nodes)
    return last


def _sizes_at(node: fx.Node, model: nn.Module) -> list[tuple[int, int]]:
    """Return the output sizes of a layer, or of the weights that a function reads."""
    if node.op == "call_module":
        layer = model.get_submodule(str(node.target))
        return sizes_of(layer, is_triple(node, layer))
    if node.op == "call_function":  # a function with weights among its arguments: a linear or a convolution
        reads = [n for n in node.all_input_nodes if n.op == "get_attr"]
        shapes = [p.shape for n in reads if (p := parameter_of(model, str(n.target))) is not None]
        return [(shape[-1], 1) for shape in shapes if len(shape) == 2] if "attention" in str(node.target) else []
    return []


def _heads_at(node: fx.Node, sizes: Mapping[int, int]) -> list[tuple[int, int]]:
    """Return what a node cuts into heads: a function that is told their number, or a reshape to (..., heads, size)."""
    if node.op == "call_function" and callable(node.target):
        try:
            heads = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments.get("num_heads")
        except (TypeError, ValueError):
            heads = None
        weights = [n for n in node.all_input_nodes if n.op == "get_attr"]
        return [(size, heads) for size in sizes if size % heads == 0] if isinstance(heads, int) and weights else []
    if node.op == "call_method" and node.target in ("reshape", "view"):
        pairs = zip(node.args[1:], node.args[2:], strict=False)
        return [(a * b, a) for a, b in pairs if isinstance(a, int) and isinstance(b, int) and a * b in sizes]
    return []
