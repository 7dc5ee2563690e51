"""Sites: every place where a graph consumes a weight that can be masked.

A weight is what the operand of a convolution or a matrix product is, wherever it is read: inside a torch.nn module that is
called whole, or as an argument of a function (`passes.weights.operands`).
"""

import fnmatch
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx, nn
from torch.nn.utils.prune import BasePruningMethod

from passes.capture.leaves import is_builtin, is_container
from passes.capture.regions import Capture, called_modules
from passes.weights.operands import reads
from passes.weights.reasons import Reason, Why
from passes.weights.source import multiplied_attributes, replaced_data

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

    `problem` says why the weight is not to be masked; it is None where it can be.
    """

    name: str  # as named_parameters() gives it first
    index: int  # position among all weights, in named_parameters() order
    shape: tuple[int, ...]
    uses: tuple[Use, ...]
    problem: Reason | None = None
    stacked: bool = False  # whether it is a stack of matrices along its first dimension, as experts are

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape of what inputs are multiplied by: of one expert of a stack, else of the whole."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def op(self) -> str:
        """The operation of the first use."""
        return self.uses[0].op

    @property
    def size(self) -> int:
        """The number of elements."""
        return torch.Size(self.shape).numel()


def find_sites(
    model: nn.Module, capture: Capture, include: Collection[str] = (), multiplied: Mapping[str, str] | None = None
) -> tuple[Site, ...]:
    """Find every weight that the model consumes, in either mode.

    Args:
        model: the module that `capture` was traced from.
        capture: what `passes.capture.regions.trace` found.
        include: names of parameters that are weights whatever reads them.
        multiplied: {parameter name: op} of the products that a run has met, None without a run.

    Returns:
        One site per weight of two or more dimensions and per included parameter, in `named_parameters()` order.

    Example:
        >>> from passes.capture.regions import trace
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> [(site.name, site.op, site.shape) for site in find_sites(model, trace(model))]
        [('0.weight', 'conv', (8, 3, 3, 3))]
    """
    found: dict[nn.Parameter, list[Use]] = {}
    problems: dict[nn.Parameter, Reason] = {}
    for path, region in capture.regions.items():
        module = model.get_submodule(path)
        for graph in dict.fromkeys(region.graphs.values()):
            for weight, use, problem in _region_uses(module, path, graph, region.constants):
                if use not in (uses := found.setdefault(weight, [])):
                    uses.append(use)
                if problem:
                    problems[weight] = problem
    for path in capture.leaves:
        for _, weight, op in leaf_weights(model.get_submodule(path)):
            found.setdefault(weight, []).append(Use(path, "", op, _out_dim(op)))
    for weight, use, problem in _opaque_weights(model, capture):
        if weight not in found:
            found[weight] = [use]
            problems |= {weight: problem} if problem else {}
    replaced = set(_replaced_weights(model, capture))
    modules = dict(model.named_modules(remove_duplicate=False))
    sites = []
    for name, weight in model.named_parameters():
        uses, problem = found.get(weight, []), problems.get(weight)
        if multiplied is not None:
            problem = _resolved(problem, name in multiplied)
        if multiplied is not None and name in multiplied and (not uses or uses[0].op == "python"):
            uses = [Use("", "", multiplied[name], None)]
        if name in include:
            uses, problem = uses or [Use("", "", "included", None)], None
        elif not uses or weight.dim() < 2:
            continue
        elif weight.is_complex():
            problem = Reason(Why.UNSUPPORTED, "its numbers are complex")
        elif not _is_attribute(modules, name):
            problem = Reason(Why.UNSUPPORTED, "no module has it as an attribute, beside which its mask could be stored")
        elif weight in replaced:
            problem = Reason(Why.UNSUPPORTED, "Python code assigns its .data, which a mask cannot follow")
        if weight.numel() == 0:
            problem = Reason(Why.RULE, "it has no elements")
        stacked = weight.dim() == 3 and uses[0].op in _STACKS
        sites.append(Site(name, len(sites), tuple(weight.shape), tuple(uses), problem, stacked))
    return tuple(sites)


def _resolved(problem: Reason | None, multiplied: bool) -> Reason | None:
    """Return what is left of a problem when a run has shown whether a product reads the weight."""
    if problem and problem.why is Why.UNKNOWN:
        return replace(problem, why=Why.TABLE)
    if not problem or not problem.is_open:
        return problem
    return None if multiplied else Reason(Why.TABLE, "no product of the run on the given inputs reads it")


# Operations that multiply by one matrix of a stack, or by each of them.
_STACKS = frozenset(["experts", "matmul", "addmm", "mm", "bmm", "baddbmm", "_grouped_mm"])


def leaf_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Yield the weights that a torch.nn module multiplies by when it is called: (name inside it, weight, operation).

    Those of a composite such as nn.TransformerEncoderLayer, whose fast path reads the weights of its children itself, are
    those of its children.
    """
    if not is_builtin(module) and not is_container(module):
        return
    for cls, op, patterns in _LEAF_WEIGHTS:
        if isinstance(module, cls):
            op = f"grouped {op}" if op == "conv_transpose" and getattr(module, "groups", 1) > 1 else op
            for name, weight in module.named_parameters():
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                    yield name, weight, op
            return
    for path, child in module.named_children():
        yield from ((f"{path}.{name}", weight, op) for name, weight, op in leaf_weights(child))


def _region_uses(
    module: nn.Module, path: str, graph: fx.Graph, constants: Mapping[str, torch.Tensor]
) -> Iterator[tuple[nn.Parameter, Use, Reason | None]]:
    for node in graph.nodes:
        if node.op == "call_module":
            for _, weight, op in leaf_weights(module.get_submodule(str(node.target))):
                yield weight, Use(path, node.name, op, _out_dim(op)), None
    for read in reads(module, graph, constants):
        where = f" at node {read.node.name!r}" + (f" of module {path!r}" if path else "")
        problem = read.problem
        if problem and problem.why is Why.UNKNOWN:
            problem = replace(problem, text=problem.text + where)
        yield read.weight, Use(path, read.node.name, read.op, read.out_dim), problem


def _out_dim(op: str) -> int | None:
    """The dimension of a weight that indexes outputs; where transposed convolutions have groups, none does alone."""
    return {"conv_transpose": 1, "grouped conv_transpose": None}.get(op, 0)


def _opaque_weights(model: nn.Module, capture: Capture) -> Iterator[tuple[nn.Parameter, Use, Reason | None]]:
    """Yield the weights that Python code reads which no graph shows: of opaque modules, and of torch.nn's own."""
    for path, reason in capture.opaque.items():
        module = model.get_submodule(path)
        multiplied = multiplied_attributes(type(module))
        known = [(kind, op, names) for kind, op, names in _LEAF_WEIGHTS if isinstance(module, kind)]
        for name, weight in module.named_parameters(recurse=False):
            own = [op for _, op, names in known if any(fnmatch.fnmatchcase(name, n) for n in names)]
            if own and name in multiplied:  # a user's own convolution
                yield weight, Use(path, name, own[0], _out_dim(own[0])), None
            elif weight.dim() >= 3 and name in multiplied:
                yield weight, Use(path, name, "experts" if multiplied[name] else "product", None), None
            elif weight.dim() >= 2:
                why = Reason(
                    Why.UNSUPPORTED, f"Python code outside the graph reads it ({reason})", is_open=True, in_python=True
                )
                yield weight, Use(path, name, "python", None), why
    leaves = [(path, model.get_submodule(path)) for path in capture.leaves]
    for path, region in capture.regions.items():
        leaves += called_modules(model.get_submodule(path), region.graphs)
    for path, leaf in leaves:
        for weight in _unknown_weights(leaf):
            why = f"torch.nn.{type(leaf).__name__} reads it in its own way, or code outside the graph does"
            hooks = [hook for module in leaf.modules() for hook in module._forward_pre_hooks.values()]
            if any(isinstance(hook, BasePruningMethod) for hook in hooks):
                why = "torch.nn.utils.prune computes with it; make that permanent by torch.nn.utils.prune.remove(module, name)"
            elif hooks:
                why = "a hook computes with it (as torch.nn.utils.weight_norm does; those of parametrizations are masked)"
            yield weight, Use(path, "", type(leaf).__name__, None), Reason(Why.UNSUPPORTED, why, is_open=not hooks)


def _is_attribute(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether a module has a parameter by the last part of its name: some containers give names with dots."""
    path, _, attribute = name.rpartition(".")
    return path in modules and attribute in modules[path]._parameters


def _replaced_weights(model: nn.Module, capture: Capture) -> Iterator[nn.Parameter]:
    """Yield the weights whose `.data` Python code assigns while it runs."""
    for path in capture.opaque:
        module = model.get_submodule(path)
        own = dict(module.named_parameters())
        yield from (own[name] for name in replaced_data(type(module)) if name in own)


def _unknown_weights(leaf: nn.Module) -> list[nn.Parameter]:
    """Weights of a torch.nn module that are not in the table above, or that other code reads."""
    if not is_builtin(leaf):
        return []
    multiplying = (nn.ParameterList, nn.ParameterDict, *(cls for cls, _, _ in _LEAF_WEIGHTS))
    inside = {p: None for m in leaf.modules() if isinstance(m, multiplying) for p in m.parameters() if p.dim() >= 2}
    return [p for p in inside if p not in {weight for _, weight, _ in leaf_weights(leaf)}]
