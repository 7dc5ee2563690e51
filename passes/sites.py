"""Sites: every place where a graph consumes a weight that can be masked.

A weight is what the operand of a convolution or a matrix product is, wherever it is read: inside a torch.nn module that is
called whole, or as an argument of a function. The search starts at the consumers and walks back through views.
"""

import fnmatch
import inspect
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from passes.capture import Capture, called_modules, is_builtin

# The weights that torch.nn's modules multiply by: (class, op, fnmatch patterns of their names).
_LEAF_WEIGHTS: tuple[tuple[type[nn.Module], str, tuple[str, ...]], ...] = (
    (nn.modules.conv._ConvTransposeNd, "conv_transpose", ("weight",)),
    (nn.modules.conv._ConvNd, "conv", ("weight",)),
    (nn.Linear, "linear", ("weight",)),
    (nn.Bilinear, "bilinear", ("weight",)),
    (
        nn.MultiheadAttention,
        "attention",
        ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"),
    ),
    (nn.RNNBase, "recurrent", ("weight_*",)),  # every layer and direction: weight_ih_l0, weight_hh_l0, weight_hr_l0
    (nn.RNNCellBase, "recurrent", ("weight_*",)),
)

# Functions that multiply by a weight: (op, {argument name: position}, dimension of the weight that indexes outputs).
_CONV = {"weight": 1}
_MATMUL = {"input": 0, "other": 1, "mat2": 1}
_CONSUMERS: dict[Any, tuple[str, dict[str, int], int | None]] = {
    F.linear: ("linear", {"weight": 1}, 0),
    F.bilinear: ("bilinear", {"weight": 2}, 0),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d), ("conv", _CONV, 0)),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), ("conv_transpose", _CONV, 1)),
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, operator.matmul), ("matmul", _MATMUL, None)),
    **{f: ("matmul", {"mat1": 1, "mat2": 2}, None) for f in (torch.addmm,)},
    **{f: ("matmul", {"batch1": 1, "batch2": 2}, None) for f in (torch.baddbmm,)},
    **dict.fromkeys(("matmul", "mm", "bmm", "__matmul__", "__rmatmul__"), ("matmul", _MATMUL, None)),
}

_VIEWS = frozenset(
    """view reshape permute transpose swapaxes t flatten unflatten unsqueeze squeeze chunk split tensor_split unbind
    expand contiguous movedim moveaxis view_as reshape_as expand_as""".split()
)
_SPLITS = frozenset(["chunk", "split", "tensor_split", "unbind"])


@dataclass(frozen=True)
class Use:
    """One node that consumes a weight."""

    region: str  # module path of the captured region, "" for the whole model
    node: str
    op: str
    out_dim: int | None  # the weight's dimension that indexes outputs, where it is known


@dataclass(frozen=True)
class Site:
    """A weight that graphs consume: one per parameter, however often it is used.

    `unsupported` says why the weight cannot be masked, and is empty where it can.
    """

    name: str  # as named_parameters() gives it first
    index: int  # position among all weights, in named_parameters() order
    shape: tuple[int, ...]
    uses: tuple[Use, ...]
    unsupported: str = ""

    @property
    def op(self) -> str:
        """The operation of the first use."""
        return self.uses[0].op

    @property
    def size(self) -> int:
        """The number of elements."""
        return torch.Size(self.shape).numel()


def find_sites(model: nn.Module, capture: Capture) -> tuple[Site, ...]:
    """Find every weight that the model consumes, in either mode.

    Args:
        model: the module that `capture` was traced from.
        capture: what `passes.capture.trace` found.

    Returns:
        One site per weight of two or more dimensions, in `named_parameters()` order.

    Example:
        >>> from passes.capture import trace
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> [(site.name, site.op, site.shape) for site in find_sites(model, trace(model))]
        [('0.weight', 'conv', (8, 3, 3, 3))]
    """
    found: dict[nn.Parameter, list[Use]] = {}
    broken: dict[nn.Parameter, str] = {}
    for path, region in capture.regions.items():
        module = model.get_submodule(path)
        for graph in dict.fromkeys(region.graphs.values()):
            for weight, use, problem in _region_uses(module, path, graph):
                if use not in (uses := found.setdefault(weight, [])):
                    uses.append(use)
                if problem:
                    broken[weight] = problem
    for path in capture.leaves:
        for _, weight, op in leaf_weights(model.get_submodule(path)):
            found.setdefault(weight, []).append(Use(path, "", op, _out_dim(op)))
    for weight, use, problem in _opaque_weights(model, capture):
        if weight not in found:
            found[weight], broken[weight] = [use], problem
    names = [(name, p) for name, p in model.named_parameters() if p in found and p.dim() >= 2]
    return tuple(Site(name, i, tuple(p.shape), tuple(found[p]), broken.get(p, "")) for i, (name, p) in enumerate(names))


def leaf_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Yield the weights that a torch.nn module multiplies by when it is called: (name inside it, weight, operation).

    Those of a composite such as nn.TransformerEncoderLayer, whose fast path reads the weights of its children itself, are
    those of its children.
    """
    if not is_builtin(module):
        return
    for cls, op, patterns in _LEAF_WEIGHTS:
        if isinstance(module, cls):
            for name, weight in module.named_parameters():
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                    yield name, weight, op
            return
    for path, child in module.named_children():
        yield from ((f"{path}.{name}", weight, op) for name, weight, op in leaf_weights(child))


def _region_uses(module: nn.Module, path: str, graph: fx.Graph) -> Iterator[tuple[nn.Parameter, Use, str]]:
    for node in graph.nodes:
        if node.op == "call_module":
            for _, weight, op in leaf_weights(module.get_submodule(str(node.target))):
                yield weight, Use(path, node.name, op, _out_dim(op)), ""
        elif node.op in ("call_function", "call_method"):
            for operand, op, out_dim in _weight_operands(node):
                weights, through = _resolve(module, operand)
                problem = f"it passes through {', '.join(through)} before {op}" if through else ""
                for weight in weights:
                    yield weight, Use(path, node.name, op, out_dim if operand.op == "get_attr" else None), problem


def _out_dim(op: str) -> int:
    return 1 if op == "conv_transpose" else 0


def _weight_operands(node: fx.Node) -> Iterator[tuple[fx.Node, str, int | None]]:
    """Yield the operands of a node that can be weights: (operand, op, dimension that indexes outputs)."""
    if node.target is torch.einsum:
        yield from ((operand, "einsum", None) for operand in node.all_input_nodes)
        return
    op, positions, out_dim = _CONSUMERS.get(node.target) or _opaque_function(node)
    for name, position in positions.items():
        operand = node.args[position] if position < len(node.args) else node.kwargs.get(name)
        if isinstance(operand, fx.Node):
            yield operand, op, out_dim


def _opaque_function(node: fx.Node) -> tuple[str, dict[str, int], int | None]:
    """A Python function that fx does not look into (torchvision's shifted_window_attention): arguments named *weight."""
    target: Any = node.target
    if node.op != "call_function" or not inspect.isfunction(target) or target.__module__.startswith("passes."):
        return "", {}, None
    if target.__module__.startswith("torch.") and target is not F.multi_head_attention_forward:
        return "", {}, None
    names = inspect.signature(target).parameters
    return target.__name__, {name: i for i, name in enumerate(names) if name.endswith("weight")}, 0


def _resolve(module: nn.Module, operand: fx.Node) -> tuple[list[nn.Parameter], list[str]]:
    """Walk back from a weight operand to its parameters.

    Returns the parameters, and the names of what is not a view on the way; ([], []) for an activation.
    """
    node = operand
    while is_view(module, node):
        node = node.all_input_nodes[0]
    parameters, through, pending = [], [], [node]
    while pending:
        node = pending.pop()
        if node.op == "get_attr":
            path, _, attribute = str(node.target).rpartition(".")
            value = module.get_submodule(path)._parameters.get(attribute)
            parameters += [] if value is None else [value]
        elif node.op == "call_function" or node.op == "call_method":
            if not is_view(module, node):
                through.append(getattr(node.target, "__name__", str(node.target)))
            pending += node.all_input_nodes
        else:
            return [], []
    return parameters, through


def is_view(module: nn.Module, node: fx.Node) -> bool:
    """Tell whether a node only looks at its one input in another shape."""
    if len(node.all_input_nodes) != 1:
        return False
    if node.op == "call_method":
        return node.target in _VIEWS
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:  # one piece of a split is a view; an indexed tensor is a table
        return _view_name(node.all_input_nodes[0]) in _SPLITS
    return _view_name(node) in _VIEWS or (node.target is getattr and node.args[1] in ("T", "mT"))


def _view_name(node: fx.Node) -> str:
    return str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", ""))


def _opaque_weights(model: nn.Module, capture: Capture) -> Iterator[tuple[nn.Parameter, Use, str]]:
    """Yield the weights that Python code reads which no graph shows: of opaque modules, and of torch.nn's own."""
    for path, reason in capture.opaque.items():
        for name, weight in model.get_submodule(path).named_parameters(path, recurse=False):
            if weight.dim() >= 2:
                yield weight, Use(path, name, "python", None), f"it is read in Python code outside the graph ({reason})"
    leaves = [(path, model.get_submodule(path)) for path in capture.leaves]
    for path, region in capture.regions.items():
        leaves += called_modules(model.get_submodule(path), region.graphs)
    for path, leaf in leaves:
        for weight in _unknown_weights(leaf):
            yield (
                weight,
                Use(path, "", type(leaf).__name__, None),
                f"torch.nn.{type(leaf).__name__} reads it in its own way",
            )


def _unknown_weights(leaf: nn.Module) -> list[nn.Parameter]:
    """Weights of a torch.nn module that is known to multiply, but not by these: a parametrized layer's original."""
    if not is_builtin(leaf):
        return []
    multiplying = tuple(cls for cls, _, _ in _LEAF_WEIGHTS)
    inside = {p: None for m in leaf.modules() if isinstance(m, multiplying) for p in m.parameters() if p.dim() >= 2}
    return [p for p in inside if p not in {weight for _, weight, _ in leaf_weights(leaf)}]
