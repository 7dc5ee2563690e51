"""Rewrite: make a captured model use its weights through masks.

A weight is reached in two ways. A module that hides its weights becomes a masked layer (`passes.masking.layers`). A weight
that a graph reads itself goes through a `call_module weight_mask` node on its way to the consumer, and once more where it is
transformed before use.
"""

from collections.abc import Collection, Mapping

from torch import Tensor, fx, nn

from passes.capture.captured import Captured
from passes.capture.host import Host
from passes.capture.kinds import attribute
from passes.capture.leaves import is_builtin
from passes.capture.regions import Capture, called_modules
from passes.masking.layers import masked_class
from passes.masking.mask import BESIDE, INNER, OUTER, Mask, masks_of
from passes.weights.operands import Read, reads


def mask_weights(model: nn.Module, capture: Capture, masks: Mapping[str, Mask]) -> nn.Module:
    """Rewrite a model and its captured graphs, in place, so that every weight in `masks` is used through its mask.

    The weights themselves stay as they are (`zero_dropped_weights_`). A mask is stored as the child `<weight>_mask` of every
    module that owns the weight, tied weights sharing one. Rewritten nodes are renamed `masked_...`.

    Args:
        model: the module that `capture` was traced from.
        capture: its graphs, not installed yet.
        masks: {parameter name: mask}.

    Returns:
        The same object.
    """
    by_weight = {model.get_parameter(name): mask for name, mask in masks.items()}
    own_code = {model.get_submodule(path) for path in (*capture.opaque, *capture.leaves)}
    regions = {model.get_submodule(path) for path in capture.regions}
    for module in list(model.modules()):
        own = [(name, by_weight[p]) for name, p in module._parameters.items() if p is not None and p in by_weight]
        for name, mask in own:
            module.add_module(f"{name}_mask", mask)
        if module not in regions and (own or module in own_code or _is_composite(module, by_weight)):
            name = type(module).__name__
            module.__class__ = masked_class(type(module), f"Masked{name}" if own else name)
    for mask in by_weight.values():
        mask.train(model.training)
    for path, region in capture.regions.items():
        module = model.get_submodule(path)
        hidden = {t for t, leaf in called_modules(module, region.graphs) if _holds_weights(leaf, by_weight)}
        for graph in dict.fromkeys(region.graphs.values()):
            transformed = [read for read in reads(module, graph, region.constants) if read.value]
            inner = _mask_transformed(module, graph, transformed, by_weight)
            _mask_reads(module, graph, by_weight, inner)
            for node in [n for n in graph.nodes if n.op == "call_module" and n.target in hidden]:
                _rename_masked(node, node.name)
    return model


def _is_composite(module: nn.Module, masks: Mapping[nn.Parameter, Mask]) -> bool:
    return bool(module._modules) and _holds_weights(module, masks)


def _holds_weights(leaf: nn.Module, masks: Mapping[nn.Parameter, Mask]) -> bool:
    return is_builtin(leaf) and any(p in masks for p in leaf.parameters())


def _mask_transformed(
    module: nn.Module, graph: fx.Graph, transformed: list[Read], masks: Mapping[nn.Parameter, Mask]
) -> set[fx.Node]:
    """Mask transformed weights and the parameters beside them; return the nodes that they are computed from."""
    paths = {p: name for name, p in module.named_parameters(remove_duplicate=False)}
    values = {read.value: read.weight for read in transformed if read.value and read.weight in masks}
    inside = {value: _sources(value) for value in values}
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for value, weight in values.items():
        attributes = {n: attribute(module, str(n.target)) for n in inside[value] if n.op == "get_attr"}
        source = next(node for node, other in attributes.items() if other is weight)
        first = inputs[-1] if inputs else next(iter(graph.nodes))
        if first.next is not source:
            first.append(source)  # before everything that needs it
        shared = set().union(*(inside[other] | {other} for other in values if other is not value))
        for node, other in attributes.items():
            if isinstance(other, nn.Parameter) and other not in masks and _is_broadcast(other, weight):
                users = [user for user in node.users if user in (inside[value] | {value}) - shared]
                _insert_mask(graph, node, f"{paths[weight]}_mask", BESIDE, source, users)
        _insert_mask(graph, value, f"{paths[weight]}_mask", OUTER, source)
    return set().union(*inside.values())


def _sources(value: fx.Node) -> set[fx.Node]:
    """Return the nodes that a value is computed from."""
    found, open_nodes = set(), [value]
    while open_nodes:
        new = set(open_nodes.pop().all_input_nodes) - found
        found |= new
        open_nodes += new
    return found


def _is_broadcast(other: Tensor, weight: Tensor) -> bool:
    sizes = zip(other.shape, weight.shape, strict=True) if other.dim() == weight.dim() else [(0, 1)]
    return all(size in (1, whole) for size, whole in sizes)


def _mask_reads(module: nn.Module, graph: fx.Graph, masks: Mapping[nn.Parameter, Mask], inner: Collection[fx.Node]) -> None:
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        path, _, attribute = str(node.target).rpartition(".")
        weight = module.get_submodule(path)._parameters.get(attribute)
        if weight is not None and weight in masks:
            _insert_mask(graph, node, f"{node.target}_mask", INNER if node in inner else None)


def _insert_mask(
    graph: fx.Graph,
    node: fx.Node,
    path: str,
    role: str | None,
    source: fx.Node | None = None,
    users: Collection[fx.Node] | None = None,
) -> None:
    """Let users of a node, all by default, read it through a mask."""
    users = list(node.users) if users is None else users
    if not users:
        return
    options = {"role": role, "source": source}
    with graph.inserting_after(node):
        masked = graph.call_module(path, (node,), {k: v for k, v in options.items() if v is not None})
    _rename_masked(masked, node.name)
    for user in users:
        user.replace_input_with(node, masked)


def _rename_masked(node: fx.Node, name: str) -> None:
    node._rename(f"masked_{name.lstrip('_')}")


def check_masked(model: nn.Module) -> None:
    """Prove that every read of a masked weight of an installed model goes through its mask.

    A module that owns one gives the masked weight to Python code (`passes.capture.host`), and a node of a graph that reads
    one is read by its mask alone.

    Raises:
        RuntimeError: naming the first weight that something reads past its mask.
    """
    masks = masks_of(model)
    weights = {model.get_parameter(name): name for name in masks}
    for path, module in model.named_modules():
        owned = [weights[p] for p in module._parameters.values() if p is not None and p in weights]
        if owned and not isinstance(module, Host):
            raise RuntimeError(f"{owned[0]} is masked, and its module {path!r} reads it past its mask.")
        for graph in dict.fromkeys(module._graphs.values()) if isinstance(module, Captured) else ():
            for node in [n for n in graph.nodes if n.op == "get_attr"]:
                weight = attribute(module, str(node.target))
                past = [user.name for user in node.users if user.target != f"{node.target}_mask"]
                if isinstance(weight, nn.Parameter) and weight in weights and past:
                    raise RuntimeError(f"{weights[weight]} is masked, and node {past[0]!r} of {path!r} reads it past its mask.")
