"""Narrow: the same architecture with fewer channels, worked out on the model's own graph.

Every layer takes as many inputs as its narrowed producers hand it, through residuals, groups and concatenations alike, and
gives as many outputs as one function of the original number says. Equal sizes thus stay equal, which is all that an addition
needs.
"""

import copy
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from passes.capture import Capture, trace
from passes.captured import install
from passes.layer_sizes import NORMS, apply_sizes, narrowed_layer, narrowed_parameter, sizes_of

Width = Callable[[int], int]  # channels of the original -> channels of the narrow network


@dataclass
class Narrowing:
    """What a walk over the graphs found: new shapes of parameters, and new constants of nodes."""

    layers: dict[str, nn.Module] = field(default_factory=dict)  # by module path, narrowed, on meta
    parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)  # read outside of layers, by name
    constants: dict[fx.Node, tuple[Any, ...]] = field(default_factory=dict)

    def count(self, model: nn.Module) -> int:
        """Return the number of parameters that the narrowed model will have, tied ones counted once."""
        sizes = {id(p): p.numel() for p in model.parameters()}
        for path, layer in self.layers.items():
            original = dict(model.get_submodule(path).named_parameters())
            sizes |= {id(original[name]): p.numel() for name, p in layer.named_parameters()}
        sizes |= {id(model.get_parameter(name)): math.prod(shape) for name, shape in self.parameters.items()}
        return sum(sizes.values())


class Narrowable:
    """A model whose graphs can be walked at any width.

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
        self._outputs = self._walk(lambda size: size, Narrowing())
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
        if self._walk(lambda size: width(size) if size in self.sizes else size, result) != self._outputs:
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

    def _walk(self, width: Width, narrowing: Narrowing) -> list[Any]:
        shapes = []
        for graph in self._graphs:
            with torch.no_grad():
                outputs = _Walk(self._meta, self.capture, graph, width, narrowing, self._last).run(*self._inputs)
            shapes.append([tuple(t.shape) for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)])
        return shapes

    def _find_sizes(self) -> dict[int, int]:
        """List the sizes that may shrink, each with the number that its new one must be a multiple of."""
        sizes: dict[int, int] = {}
        nodes = [node for graph in self._graphs for node in graph.nodes if node in _fed(graph)]
        for node in nodes:
            for size, multiple in [] if node in self._last else _sizes_at(node, self._meta):
                sizes[size] = math.lcm(sizes.get(size, 1), multiple)
        for node in nodes:
            for size, multiple in _heads_at(node, sizes):
                sizes[size] = math.lcm(sizes[size], multiple)
        return {size: multiple for size, multiple in sizes.items() if size > multiple}

    def _outputs_that_shrink(self) -> set[int]:
        """Return the sizes that show in the model's outputs: those of output layers, which have to stay."""
        narrowed = self._walk(lambda size: self.sizes.get(size, size), Narrowing())
        shapes = zip(itertools.chain(*self._outputs), itertools.chain(*narrowed), strict=True)
        changed = {old for before, after in shapes for old, new in zip(before, after, strict=True) if old != new}
        return changed & set(self.sizes)


@functools.cache
def _fed(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that the graph's inputs reach; what they do not, such as a bias made from a table, keeps its size."""
    fed: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or not fed.isdisjoint(node.all_input_nodes):
            fed.add(node)
    return fed


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


def _is_triple(node: fx.Node, layer: nn.Module) -> bool:
    """Tell whether a linear layer makes queries, keys and values, which are then taken apart."""
    if not isinstance(layer, nn.Linear) or layer.out_features != 3 * layer.in_features:
        return False
    names = ("chunk", "split", "reshape", "view", "unflatten", "tensor_split")
    users = [user for user in node.users if getattr(user.target, "__name__", user.target) in names]
    constants = [c for user in users for c in pytree.tree_leaves([*user.args[1:], *user.kwargs.values()])]
    return 3 in constants or layer.in_features in constants


def _sizes_at(node: fx.Node, model: nn.Module) -> list[tuple[int, int]]:
    """Return the output sizes of a layer, or of the weights that a function reads."""
    if node.op == "call_module":
        layer = model.get_submodule(str(node.target))
        return sizes_of(layer, _is_triple(node, layer))
    if node.op == "call_function":  # a function with weights among its arguments: a linear or a convolution
        reads = [n for n in node.all_input_nodes if n.op == "get_attr"]
        shapes = [p.shape for n in reads if (p := _parameter(model, str(n.target))) is not None]
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


def _parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    owner, _, attribute = name.rpartition(".")
    return module.get_submodule(owner)._parameters.get(attribute)


class _Walk(fx.Interpreter):
    """Run a graph on meta tensors, narrowing every layer as it is reached."""

    def __init__(
        self,
        model: nn.Module,
        capture: Capture,
        graph: fx.Graph,
        width: Width,
        narrowing: Narrowing,
        last: Container[fx.Node],
    ) -> None:
        super().__init__(model, graph=graph)
        self.width, self.narrowing, self.constants = width, narrowing, capture.regions[""].constants
        self.last = last
        self.fed = _fed(graph)

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        try:
            return super().run_node(n)
        except (RuntimeError, TypeError, IndexError, AssertionError) as error:
            raise ValueError(f"Node {n.name!r} ({n.target}) cannot be narrowed: {error}") from error

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.constants:
            return self.constants[target].to("meta")
        parameter = _parameter(self.module, str(target))
        views = {v for u in self.node.users if u.op == "call_method" for v in u.users}
        if parameter is None or self.fed.isdisjoint({*self.node.users, *views}):  # a table, or made from tables only
            return super().get_attr(target, args, kwargs)
        shape = tuple(self._raw(size) for size in parameter.shape)
        if shape != tuple(parameter.shape):
            self.narrowing.parameters[str(target)] = shape
        return parameter.new_empty(shape)

    def _raw(self, size: int) -> int:
        """Narrow a dimension of a parameter that no layer owns: a number of channels, or queries, keys and values."""
        new = self.width(size)
        return 3 * self.width(size // 3) if new == size and size % 3 == 0 else new

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        layer = self.fetch_attr(target)
        if self.node in self.fed and next(layer.parameters(), None) is not None:
            width = (lambda size: size) if self.node in self.last else self.width
            layer = narrowed_layer(layer, args[0].shape, width, _is_triple(self.node, layer))
            before = self.narrowing.layers.setdefault(target, layer)
            if [p.shape for p in before.parameters()] != [p.shape for p in layer.parameters()]:
                raise RuntimeError("it is called with inputs of different sizes")
            if isinstance(layer, NORMS):  # shapes stay, and running them on meta takes half of the time
                return args[0]
        return layer(*args, **kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is nn.functional.layer_norm:
            args = (args[0], tuple(args[0].shape[-len(args[1]) :]), *args[2:])
            self.narrowing.constants[self.node] = (self.node.args[0], args[1], *self.node.args[2:])
        return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in ("reshape", "view", "expand") and all(isinstance(a, int) for a in args[1:]):
            args = self._fitting(target, args)
        return super().call_method(target, args, kwargs)

    def _fitting(self, target: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Let one constant of a reshape follow from the others, the number of channels or else the last that can.

        An expansion takes narrowed constants.
        """
        tensor, sizes = args[0], list(args[1:])
        constant = [i for i in range(len(sizes)) if isinstance(self.node.args[i + 1], int) and sizes[i] != -1]
        if target == "expand":
            new = [self.width(n) if i in constant else n for i, n in enumerate(sizes)]
        elif -1 in sizes or math.prod(sizes) == tensor.numel():
            return args
        else:
            rest = {i: math.prod(sizes[:i] + sizes[i + 1 :]) for i in constant}
            fits = [i for i in reversed(constant) if rest[i] and tensor.numel() % rest[i] == 0]
            narrowed = [i for i in fits if rest[i] * self.width(sizes[i]) == tensor.numel()]  # the number of channels
            chosen = next(iter(narrowed + fits), None)
            new = [-1 if i == chosen else n for i, n in enumerate(sizes)]
        if new != sizes:
            kept = self.node.args[1:]
            changed = [n if i in constant and n != sizes[i] else kept[i] for i, n in enumerate(new)]
            self.narrowing.constants[self.node] = (self.node.args[0], *changed)
        return (tensor, *new)
