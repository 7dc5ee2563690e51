"""Operands: which parameters the nodes of a graph read, and as what.

Values that are computed from parameters alone are followed from where a parameter is read to where they meet an activation.
What they meet there decides: the operand of a convolution or product is a weight, an indexed one is a table, and what is
added, normalized or concatenated is neither.
"""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.torch_ops import CONSUMERS, INDEXING, JOINING, READERS, is_metadata, is_pointwise, is_view, name_of
from passes.weights.computed import Computed
from passes.weights.reasons import Reason, Why


@dataclass(frozen=True)
class Read:
    """A node that uses a parameter of two or more dimensions as a weight, or in a way that cannot be masked.

    Attributes:
        weight: the parameter.
        node: the consumer.
        op: the operation.
        out_dim: the weight's dimension that indexes outputs, where it is known.
        value: where the weight is transformed before use: the node that holds the result, in the weight's own shape.
        problem: why the weight cannot be masked for this use, None where it can.
    """

    weight: nn.Parameter
    node: fx.Node
    op: str
    out_dim: int | None = None
    value: fx.Node | None = None
    problem: Reason | None = None


@dataclass(frozen=True)
class _Derived:
    """A value that is computed from parameters and constants alone."""

    parameters: tuple[nn.Parameter, ...] = ()
    through: tuple[str, ...] = ()  # the operations on the way that are not views
    indexed: bool = False

    @property
    def matrices(self) -> tuple[nn.Parameter, ...]:
        return tuple(p for p in self.parameters if p.dim() >= 2)


def reads(module: nn.Module, graph: fx.Graph, constants: Mapping[str, Tensor]) -> Iterator[Read]:
    """Yield every node of a region's graph that consumes a parameter in an argument.

    Weights that a called module holds itself are not among them.

    Args:
        module: the root of the region.
        graph: one of its graphs.
        constants: the tensors that the graph reads and the module does not have (yet), by attribute name.
    """
    derived: dict[fx.Node, _Derived] = {}
    meta = Computed(module, constants)
    for node in graph.nodes:
        value = _derive(module, node, derived)
        if value is not None:
            derived[node] = value
        operands = list(_weight_operands(node))
        for operand, op, out_dim in operands:
            if (source := derived.get(operand)) and source.matrices:
                yield from _weight_reads(meta, node, operand, source, op, out_dim)
        if value is None and not operands:
            for operand in node.all_input_nodes:
                if (source := derived.get(operand)) and not source.indexed and (problem := _problem(module, node)):
                    yield from (Read(p, node, name_of(node), problem=problem) for p in source.matrices)


def _weight_reads(
    meta: Computed, node: fx.Node, operand: fx.Node, source: _Derived, op: str, out_dim: int | None
) -> Iterator[Read]:
    steps = ", ".join(source.through)
    if source.indexed:
        problem = Reason(Why.TABLE, f"it is indexed ({steps}) before {op}")
    elif not source.through:
        for weight in source.matrices:
            yield Read(weight, node, op, _own_dim(operand, weight, op, out_dim))
        return
    else:
        found = _in_own_shape(meta, operand, source)
        if len(found) == 1:
            yield Read(found[0][0], node, op, out_dim if found[0][1] is operand else None, found[0][1])
            return
        what = "combines it with another of its shape" if found else "changes its shape"
        problem = Reason(Why.UNSUPPORTED, f"it passes through {steps} before {op}, which {what}")
    for weight in source.matrices:
        yield Read(weight, node, op, problem=problem)


def _own_dim(operand: fx.Node, weight: nn.Parameter, op: str, out_dim: int | None) -> int | None:
    """Map the dimension of an operand back to the weight as it is stored, perhaps transposed."""
    if out_dim is None or (op == "matmul" and weight.dim() != 2):
        return None
    if operand.op == "get_attr":
        return out_dim
    transposed = name_of(operand) == "t" or (operand.target is getattr and operand.args[1] in ("T", "mT"))
    return 1 - out_dim if transposed and weight.dim() == 2 and operand.all_input_nodes[0].op == "get_attr" else None


def _derive(module: nn.Module, node: fx.Node, derived: dict[fx.Node, _Derived]) -> _Derived | None:
    """Say what a node's value is computed from, or None if an activation is part of it."""
    if node.op == "get_attr":
        path, _, attribute = str(node.target).rpartition(".")
        parameter = module.get_submodule(path)._parameters.get(attribute)
        return _Derived() if parameter is None else _Derived((parameter,))
    if node.op in ("placeholder", "output"):
        return None
    if is_metadata(node):
        return _Derived()
    inputs = [derived.get(n) for n in node.all_input_nodes]
    if is_view(node):
        return inputs[0]
    known = [i for i in inputs if i is not None]
    if len(known) < len(inputs):
        return None
    if node.op == "call_module" and next(module.get_submodule(str(node.target)).parameters(), None) is not None:
        return None
    parameters = tuple(dict.fromkeys(p for i in known for p in i.parameters))
    if not parameters:
        return _Derived()
    if name_of(node) in JOINING:
        through = tuple(dict.fromkeys(step for i in known for step in i.through))
        return _Derived(parameters, through, any(i.indexed for i in known))
    if len(parameters) > 1 and any(_weight_operands(node)):  # a parameter times a weight is an activation
        return _Derived()
    through = tuple(dict.fromkeys([step for i in known for step in i.through] + [_label(module, node)]))
    return _Derived(parameters, through, name_of(node) in INDEXING or any(i.indexed for i in known))


def _weight_operands(node: fx.Node) -> Iterator[tuple[fx.Node, str, int | None]]:
    """Yield the operands of a node that can be weights: (operand, op, dimension that indexes outputs)."""
    if node.op not in ("call_function", "call_method"):
        return
    if node.target is torch.einsum:
        yield from ((operand, "einsum", None) for operand in node.all_input_nodes)
        return
    op, places = CONSUMERS.get(node.target) or _python_function(node)
    shared = op == "conv_transpose" and (node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)) != 1
    for name, (position, out_dim) in places.items():
        operand = node.args[position] if position < len(node.args) else node.kwargs.get(name)
        if isinstance(operand, fx.Node):
            yield operand, op, None if shared else out_dim  # groups of outputs share its second dimension


def _python_function(node: fx.Node) -> tuple[str, dict[str, tuple[int, int | None]]]:
    """A function that fx does not look into (torchvision's shifted_window_attention): its arguments named *weight."""
    if not _is_python(node) and node.target is not F.multi_head_attention_forward:
        return "", {}
    target: Any = node.target
    names = inspect.signature(target).parameters
    return target.__name__, {name: (i, 0) for i, name in enumerate(names) if name.endswith("weight")}


def _is_python(node: fx.Node) -> bool:
    target: Any = node.target
    module = getattr(target, "__module__", None) or ""
    return inspect.isfunction(target) and not module.startswith(("torch.", "passes."))


def _problem(module: nn.Module, node: fx.Node) -> Reason | None:
    """Say why it is unknown what a node does with a parameter; None where it certainly does not multiply by it."""
    if node.op == "output":
        return Reason(
            Why.UNSUPPORTED, "it leaves its graph as an output, for Python code to read", is_open=True, in_python=True
        )
    if node.op == "call_module":  # whose argument is an activation, unless the module is a product that someone wrapped
        called = module.get_submodule(str(node.target))
        own = not type(called).__module__.startswith("torch.") and next(called.parameters(), None) is None
        return Reason(Why.UNKNOWN, f"{type(called).__name__} gets it as an argument") if own else None
    if _is_python(node):
        return Reason(Why.UNSUPPORTED, f"the Python function {name_of(node)} reads it", is_open=True, in_python=True)
    name = name_of(node).strip("_")
    if is_view(node) or name in READERS or is_pointwise(name):
        return None
    return Reason(Why.UNKNOWN, f"{name_of(node)} consumes it")


def _label(module: nn.Module, node: fx.Node) -> str:
    return type(module.get_submodule(str(node.target))).__name__ if node.op == "call_module" else name_of(node)


def _in_own_shape(meta: Computed, operand: fx.Node, source: _Derived) -> list[tuple[nn.Parameter, fx.Node]]:
    """Find where a transformed weight has the shape that it was stored in: (weight, node), one where it can be masked."""
    while True:
        try:
            shape = meta.value(operand).shape
        except Exception:  # depends on an activation's shape, or on values
            return []
        if found := [(p, operand) for p in source.matrices if p.shape == shape]:
            return found
        if not is_view(operand):
            return []
        operand = operand.all_input_nodes[0]
