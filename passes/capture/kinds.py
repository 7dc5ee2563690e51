"""Kinds: the Python class of the value that a node computes, as far as the graph alone says it."""

import functools
import inspect
import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

_ATTRIBUTES: dict[str, type] = {
    "shape": torch.Size,
    "dtype": torch.dtype,
    "device": torch.device,
    "layout": torch.layout,
    "ndim": int,
    **dict.fromkeys(["is_cuda", "is_meta", "is_sparse", "is_quantized", "requires_grad", "is_leaf"], bool),
    **dict.fromkeys(["T", "mT", "H", "mH", "data", "real", "imag"], Tensor),
}
_METHODS: dict[str, type] = {"dim": int, "numel": int, "nelement": int, "element_size": int, "item": float}
_NUMBERS = (int, float, bool)
_ARITHMETIC = frozenset(["add", "sub", "mul", "floordiv", "mod", "neg", "pos", "abs", "iadd", "isub", "imul"])
_COMPARISONS = frozenset(["eq", "ne", "lt", "le", "gt", "ge"])
_PASSING = (nn.Identity, nn.Dropout)  # torch.nn modules that may return what they get
_SEVERAL = (  # torch.nn modules that return more than one tensor, or may
    nn.RNNBase,
    nn.LSTMCell,
    nn.MultiheadAttention,
    nn.AdaptiveLogSoftmaxWithLoss,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)


class Kind(NamedTuple):
    """A class, None where it is not known, and the arguments of forward that were taken for tensors to tell it."""

    cls: type | None
    assumed: frozenset[str] = frozenset()


UNKNOWN = Kind(None)


class Kinds:
    """The kinds of the nodes of a graph under construction, each worked out once, when it is asked for.

    Args:
        root: the module that is traced.
        graph: its graph so far.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root, self.graph = root, graph
        self._known: dict[fx.Node, Kind] = {}

    def of(self, node: fx.Node) -> Kind:
        """Return the kind of a node's value."""
        for earlier in self.graph.nodes:  # in order, since a long chain would be too deep to follow back
            if earlier not in self._known:
                self._known[earlier] = self._work_out(earlier)
            if earlier is node:
                break
        return self._known.get(node, UNKNOWN)

    def _work_out(self, node: fx.Node) -> Kind:
        name = str(node.target)
        if node.op == "placeholder":
            stars = {"*": tuple, "**": dict}.get(name[: name.rfind("*") + 1])
            return Kind(stars) if stars else Kind(Tensor, frozenset([name]))
        if node.op == "get_attr":
            return Kind(type(attribute(self.root, name)))
        if node.op == "call_module":
            return self._of_module(self.root.get_submodule(name), node)
        if node.op not in ("call_function", "call_method"):
            return UNKNOWN
        operands = [self._of_operand(a) for a in node.args]
        assumed = frozenset().union(*(o.assumed for o in operands))
        return Kind(_result(node, [o.cls for o in operands]), assumed)

    def _of_operand(self, operand: Any) -> Kind:
        return self._known.get(operand, UNKNOWN) if isinstance(operand, fx.Node) else Kind(type(operand))

    def _of_module(self, module: nn.Module, node: fx.Node) -> Kind:
        if isinstance(module, _PASSING):
            return self._of_operand(node.args[0]) if node.args else UNKNOWN
        return Kind(Tensor) if returns_tensor(module) else UNKNOWN


def returns_tensor(module: nn.Module) -> bool:
    """Whether a module is one of torch.nn's that always return one tensor."""
    own = type(module).__module__.startswith("torch.nn.modules") and not module._modules
    return own and not isinstance(module, (*_PASSING, *_SEVERAL))


def attribute(root: nn.Module, target: str) -> Any:
    """Return what a `get_attr` node reads, without asking the module's own `__getattr__`."""
    path, _, name = target.rpartition(".")
    owner = root.get_submodule(path)
    found = (holder[name] for holder in (owner._parameters, owner._buffers, vars(owner)) if name in holder)
    return next(found, None)


def _result(node: fx.Node, operands: list[type | None]) -> type | None:
    """Return the class of what a function or a method returns, by the classes of its positional arguments."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    first = operands[0] if operands else None
    if node.target is getattr:
        return _ATTRIBUTES.get(str(node.args[1])) if _is_tensor(first) else None
    if node.target is operator.getitem:
        whole = isinstance(node.args[1], slice)
        return {Tensor: Tensor, nn.Parameter: Tensor, torch.Size: torch.Size if whole else int}.get(first)
    if node.op == "call_method":
        if name == "size":
            return int if len(node.args) + len(node.kwargs) > 1 else torch.Size
        return _METHODS.get(name) or (_returned(name) if _is_tensor(first) else None)
    if getattr(node.target, "__module__", "") == "_operator":
        return _of_operator(name.strip("_"), operands)
    return _returned(name) if _is_torch(node.target) else _annotated(node.target)


def _of_operator(name: str, operands: list[type | None]) -> type | None:
    if any(_is_tensor(kind) for kind in operands):
        return Tensor
    if all(kind in _NUMBERS for kind in operands):
        if name in _COMPARISONS:
            return bool
        if name in _ARITHMETIC:
            return float if float in operands else int
        return float if name == "truediv" else None
    return None


def _is_tensor(kind: type | None) -> bool:
    return kind is not None and issubclass(kind, Tensor)


def _is_torch(function: Any) -> bool:
    module = getattr(function, "__module__", None) or ""
    return module.partition(".")[0] == "torch" or getattr(torch, getattr(function, "__name__", ""), None) is function


@functools.cache
def _returned(name: str) -> type | None:
    """Return what torch's function of a name returns by its schema, or by the annotation of its Python form."""
    packet = getattr(torch.ops.aten, name, None) or getattr(torch.ops.aten, name.removeprefix("i"), None)
    if packet is None or not hasattr(packet, "overloads"):
        return _annotated(getattr(F, name, None))
    returns = {tuple(str(r.type) for r in getattr(packet, o)._schema.returns) for o in packet.overloads()}
    if returns == {("Tensor",)}:
        return Tensor
    return bool if returns == {("bool",)} else None


def _annotated(function: Any) -> type | None:
    annotation = inspect.signature(function).return_annotation if inspect.isfunction(function) else None
    return Tensor if annotation in (Tensor, "Tensor", "torch.Tensor") else None
