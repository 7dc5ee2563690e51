"""Dead channels: those that no kept weight feeds, or that no kept weight reads, taken out of every layer that has them.

A channel of a value is an atom. What adds two values makes their atoms one; what concatenates them puts the lists one after
the other. A class of atoms is removed where every reader either has no weight for it or sees the same number at every place,
which then moves into the reader's bias. What is not understood keeps its channels.
"""

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from passes.channels.constants import constants_of, is_depthwise
from passes.counting.recorder import thawed
from passes.torch_ops import writes_in_place

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLS = (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd, nn.AvgPool2d)
_ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.Identity),
)
_UNARY = {F.relu, F.relu6, F.gelu, F.silu, F.hardswish, F.hardsigmoid, F.leaky_relu, torch.relu, torch.sigmoid, torch.tanh}
_UNARY_METHODS = {"relu", "relu_", "sigmoid", "tanh", "contiguous", "clone", "detach"}
_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_MULTIPLY = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}


@dataclass(frozen=True)
class Channels:
    """The channels of a value.

    Attributes:
        atoms: (channels,) int64, which atom each is.
        constants: (channels,), the number that a channel holds at every place; NaN where it varies.
        dim: the dimension that indexes them.
    """

    atoms: Tensor
    constants: Tensor
    dim: int = 1


class _Atoms:
    """Atoms, and which of them are one: a union-find over integers."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self.pinned: set[int] = set()

    def new(self, count: int) -> Tensor:
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def find(self, atom: int) -> int:
        while self._parent[atom] != atom:
            self._parent[atom] = atom = self._parent[self._parent[atom]]
        return atom

    def join(self, a: Tensor, b: Tensor) -> None:
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            self._parent[self.find(x)] = self.find(y)

    def pin(self, atoms: Tensor) -> None:
        self.pinned.update(atoms.tolist())

    def classes(self, atoms: Tensor) -> list[int]:
        return [self.find(atom) for atom in atoms.tolist()]


@dataclass
class Layer:
    """A convolution, linear layer or norm with its channels; a norm and a depthwise convolution put out what they get."""

    module: Any
    inputs: Tensor
    outputs: Tensor
    constants: Tensor  # of its inputs, what all calls agree on

    @property
    def reads(self) -> bool:
        """Whether every output is a sum over all inputs."""
        return self.inputs is not self.outputs and getattr(self.module, "groups", 1) == 1


class Follower(fx.Interpreter):
    """Runs a graph on shapes and follows the channels of every value.

    Args:
        module: the root, in evaluation mode.
        graph: one that `module` runs in evaluation.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.atoms = _Atoms()
        self.layers: dict[str, Layer] = {}
        self._channels: dict[fx.Node, Channels] = {}
        owners = Counter(p for owner in module.modules() for p in owner._parameters.values() if p is not None)
        self._tied = {parameter for parameter, count in owners.items() if count > 1}

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        result = getattr(self, n.op)(n.target, thawed(args), thawed(kwargs))
        sources = [self._channels[s] for s in n.all_input_nodes if s in self._channels]
        found = self._follow(n, sources) if sources or n.op == "call_module" else None
        if found is not None:
            self._channels[n] = found
        else:
            for source in sources:
                self.atoms.pin(source.atoms)
        return result

    def _follow(self, node: fx.Node, sources: list[Channels]) -> Channels | None:
        """Return the channels of a node's value; None where what happens to them is not known."""
        shapes = [self.env[s].shape for s in node.all_input_nodes if isinstance(self.env.get(s), Tensor)]
        module = self.fetch_attr(str(node.target)) if node.op == "call_module" else None
        if writes_in_place(node, module) and len(node.all_input_nodes[0].users) > 1:
            return None  # others see what it writes, or not
        if module is not None:
            if isinstance(module, (*_CONVOLUTIONS, nn.Linear, _BatchNorm)) and len(shapes) == 1:
                return self._layer(str(node.target), module, sources, shapes[0])
            if isinstance(module, nn.Flatten) and len(sources) == 1 and (module.start_dim, module.end_dim) == (1, -1):
                return _flattened(sources[0], shapes[0])
            pool = isinstance(module, _POOLS) and not (isinstance(module, nn.AvgPool2d) and module.padding not in (0, (0, 0)))
            if len(sources) != 1 or (pool and sources[0].dim != 1):
                return None
            known = pool or isinstance(module, _ELEMENTWISE) or type(module).__name__ == "StochasticDepth"
            return _through(module, sources[0], pool) if known else None
        name, options = node.target, node.kwargs
        if name in _ADD or name in _MULTIPLY:
            return self._combined(node, sources, shapes, name in _MULTIPLY) if not options else None
        if name in (torch.cat, torch.concat):
            return self._joined(node)
        if len(sources) != 1 or len(node.all_input_nodes) != 1:
            return None
        if name in _UNARY or (node.op == "call_method" and name in _UNARY_METHODS):
            call = name if callable(name) else operator.methodcaller(str(name))
            rest = {k: v for k, v in options.items() if k not in ("inplace",)}
            return _through(lambda t: call(t, *node.args[1:], **rest), sources[0], False)
        if name in (torch.flatten, "flatten") and tuple(node.args[1:]) == (1,) and not options:
            return _flattened(sources[0], shapes[0])
        if name is F.adaptive_avg_pool2d:
            return sources[0] if sources[0].dim == 1 else None
        if name in ("mean", torch.mean) and _dims(node) in ((2, 3), (-2, -1), (-1, -2)) and sources[0].dim == 1:
            return sources[0]
        return None

    def _layer(self, path: str, module: Any, sources: list[Channels], shape: torch.Size) -> Channels | None:
        if isinstance(module, _CONVOLUTIONS) and len(shape) != len(module.kernel_size) + 2:  # without a batch
            return None
        dim = len(shape) - 1 if isinstance(module, nn.Linear) else 1
        source = sources[0] if sources and sources[0].dim == dim else None
        constants = source.constants if source else torch.full((shape[dim],), torch.nan, dtype=torch.float64)
        layer = self.layers.get(path) or self._new_layer(path, module, constants)
        if source:
            self.atoms.join(source.atoms, layer.inputs)
        else:
            for atoms in (*(other.atoms for other in sources), layer.inputs):
                self.atoms.pin(atoms)
        layer.constants = torch.where(constants == layer.constants, constants, torch.nan)
        return Channels(layer.outputs, constants_of(module, constants), dim)

    def _new_layer(self, path: str, module: Any, constants: Tensor) -> Layer:
        inputs = self.atoms.new(len(constants))
        same = isinstance(module, _BatchNorm) or is_depthwise(module)
        outputs = inputs if same else self.atoms.new(_outputs(module))
        grouped = getattr(module, "groups", 1) > 1 and not same
        if grouped or any(p in self._tied for p in module.parameters()):
            self.atoms.pin(torch.cat([inputs, outputs]))
        self.layers[path] = Layer(module, inputs, outputs, constants)
        return self.layers[path]

    def _joined(self, node: fx.Node) -> Channels | None:
        values: Any = node.args[0]
        dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        parts = [self._channels[value] for value in values if value in self._channels]
        if len(parts) < len(values) or any(part.dim != dim for part in parts):
            return None
        return Channels(torch.cat([p.atoms for p in parts]), torch.cat([p.constants for p in parts]), dim)

    def _combined(self, node: fx.Node, sources: list[Channels], shapes: list[torch.Size], product: bool) -> Channels | None:
        combine = operator.mul if product else operator.add
        if len(node.args) != 2:
            return None
        if len(sources) == 1 and len(node.all_input_nodes) == 1:
            other = next((a for a in node.args if isinstance(a, (int, float))), None)
            twice = node.args[0] is node.args[1]
            value = sources[0].constants if twice else other
            return None if value is None else Channels(sources[0].atoms, combine(sources[0].constants, value), sources[0].dim)
        if len(sources) != 2 or len({len(s) for s in shapes}) != 1 or len({(s.dim, len(s.atoms)) for s in sources}) != 1:
            return None
        a, b = sources
        self.atoms.join(a.atoms, b.atoms)
        constants = combine(a.constants, b.constants)
        if product:  # a channel that is 0 stays 0 whatever it is multiplied by
            constants = torch.where((a.constants == 0) | (b.constants == 0), 0.0, constants)
        return Channels(a.atoms, constants, a.dim)


def _through(call: Callable[[Tensor], Tensor], source: Channels, pool: bool) -> Channels:
    return Channels(source.atoms, source.constants if pool else call(source.constants.clone()), source.dim)


def _dims(node: fx.Node) -> tuple[int, ...]:
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", ())
    return tuple(dims) if isinstance(dims, (list, tuple)) else (dims,)  # pyright: ignore


def _flattened(source: Channels, shape: torch.Size) -> Channels | None:
    if source.dim != 1:
        return None
    places = shape[2:].numel()
    return Channels(source.atoms.repeat_interleave(places), source.constants.repeat_interleave(places))


def _outputs(module: Any) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels
