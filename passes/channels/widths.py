"""Widths: one run of a graph on meta tensors, with every layer narrowed as it is reached."""

import math
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from passes.capture.regions import Capture
from passes.channels.layer_sizes import NORMS, narrowed_layer

Width = Callable[[int], int]  # channels of the original -> channels of the narrow network


@dataclass
class Narrowing:
    """What a run of the graphs found: new shapes of parameters, and new constants of nodes."""

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


def fed_nodes(graph: fx.Graph) -> dict[fx.Node, None]:
    """Return the nodes that the graph's inputs reach; what they do not, such as a bias made from a table, keeps its size."""
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op == "placeholder" or any(source in found for source in node.all_input_nodes):
            found[node] = None
    return found


def is_triple(node: fx.Node, layer: nn.Module) -> bool:
    """Whether a linear layer makes queries, keys and values, which are then taken apart."""
    if not isinstance(layer, nn.Linear) or layer.out_features != 3 * layer.in_features:
        return False
    names = ("chunk", "split", "reshape", "view", "unflatten", "tensor_split")
    users = [user for user in node.users if getattr(user.target, "__name__", user.target) in names]
    constants = [c for user in users for c in pytree.tree_leaves([*user.args[1:], *user.kwargs.values()])]
    return 3 in constants or layer.in_features in constants


def parameter_of(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return a module's parameter by its name, or None where the name is of something else."""
    owner, _, attribute = name.rpartition(".")
    return module.get_submodule(owner)._parameters.get(attribute)


class NarrowingInterpreter(fx.Interpreter):
    """Run a graph on meta tensors, narrowing every layer as it is reached."""

    def __init__(
        self, model: nn.Module, capture: Capture, graph: fx.Graph, width: Width, narrowing: Narrowing, last: Container[fx.Node]
    ) -> None:
        super().__init__(model, graph=graph)
        self.width, self.narrowing, self.constants = width, narrowing, capture.regions[""].constants
        self.last = last
        self.fed = fed_nodes(graph)

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        try:
            return super().run_node(n)
        except (RuntimeError, TypeError, IndexError, AssertionError) as error:
            raise ValueError(f"Node {n.name!r} ({n.target}) cannot be narrowed: {error}") from error

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.constants:
            return self.constants[target].to("meta")
        parameter = parameter_of(self.module, str(target))
        views = {v for u in self.node.users if u.op == "call_method" for v in u.users}
        if parameter is None or self.fed.keys().isdisjoint({*self.node.users, *views}):  # a table, or made from tables only
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
            layer = narrowed_layer(layer, args[0].shape, width, is_triple(self.node, layer))
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
