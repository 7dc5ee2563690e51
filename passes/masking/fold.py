"""Fold: a masked model back to the plain dense one it was made from, with the masks baked into the weights."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from passes.capture.captured import Captured, user_class
from passes.capture.effects import modes_kept
from passes.capture.regions import GRAPH_STATE
from passes.masking.compressed import decompress
from passes.masking.layers import Masked, leaf_class
from passes.masking.mask import OUTER, Mask, masks_of, zero_dropped_weights_
from passes.weights.computed import Computed


def fold_(model: nn.Module) -> nn.Module:
    """Undo capture and masking, in place: every module gets its own class and forward back, dropped weights stay 0.

    Some weights are transformed before use into values that are not 0 where the mask drops. If a parametrization does that, it
    is removed and its module gets the result. Any other module keeps its graph, with the mask as a buffer.

    Args:
        model: a captured and masked model.

    Returns:
        The same object, with the classes, parameters and state_dict keys of the original model, except for these.
    """
    zero_dropped_weights_(decompress(model))
    with modes_kept(model, evaluating=True):  # so that computing a weight changes nothing
        _bake(model)
    return model


def _bake(model: nn.Module) -> None:
    baked: dict[tuple[nn.Module, str], Tensor] = {}  # {(owner, name): the weight that is used}
    kept: dict[tuple[nn.Module, str], Tensor] = {}  # {(owner, name): the mask of the transformed weight}
    for module in [m for m in model.modules() if isinstance(m, Captured)]:
        needed = _needed(module)
        own = {node: _parametrized(module, node) for node in needed}
        if needed and (None in own.values() or vars(module).get("keeps_graph")):
            kept |= _keep_graph(module, needed)
        else:
            baked |= {place: needed[node] for node, place in own.items() if place}
    unmask_(model)
    for (owner, name), mask in kept.items():
        owner.register_buffer(name, mask)
    for (owner, name), used in baked.items():
        cls: Any = type(owner)  # all copies share it, and torch deletes its attribute
        _set_class(owner, type(cls.__name__, cls.__bases__, dict(vars(cls))))
        parametrize.remove_parametrizations(owner, name)
        owner.get_parameter(name).data = used


def transformed_weights(model: nn.Module) -> list[str]:
    """List the masked weights that the model transforms into values that are not 0 where the mask drops."""
    names = {mask: name for name, mask in masks_of(model).items()}
    with modes_kept(model, evaluating=True):
        nodes = [(m, node) for m in model.modules() if isinstance(m, Captured) for node in _needed(m)]
    return sorted({names[module.get_submodule(str(node.target))] for module, node in nodes})  # pyright: ignore


@torch.no_grad()
def _needed(module: Captured) -> dict[fx.Node, Tensor]:
    """Return the values of transformed weights that would change if the mask were removed."""
    graphs = dict.fromkeys(module._graphs.values())
    outer = [n for g in graphs for n in g.nodes if n.op == "call_module" and n.kwargs.get("role") == OUTER]
    found, computed = {}, Computed(module, meta=False)
    for node in outer:
        raw, masked = computed.value(node.all_input_nodes[0]), computed.value(node)
        if not masked.is_meta and not torch.equal(raw, masked):  # NaN differs from itself
            found[node] = masked.clone()
    return found


@torch.no_grad()
def _parametrized(module: nn.Module, node: fx.Node) -> tuple[nn.Module, str] | None:
    """Return the module and the name of the parametrized tensor that a node computes, if it computes one whole."""
    path, _, rest = str(node.target).rpartition("parametrizations.")
    owner, name = module.get_submodule(path.rstrip(".")), rest.partition(".")[0]
    if not parametrize.is_parametrized(owner, name):
        return None
    value, whole = Computed(module, meta=False).value(node.all_input_nodes[0]), getattr(owner, name)
    return (owner, name) if torch.equal(value.nan_to_num(), whole.nan_to_num()) else None


@torch.no_grad()
def _keep_graph(module: Captured, outer: dict[fx.Node, Tensor]) -> dict[tuple[nn.Module, str], Tensor]:
    """Apply masks of transformed weights as buffers, which are returned, and let the module go on running its graphs."""
    vars(module)["keeps_graph"] = True
    buffers = {}
    for node, value in outer.items():
        path, _, name = str(node.target).rpartition(".")
        mask, raw = module.get_submodule(str(node.target)), Computed(module, meta=False).value(node.all_input_nodes[0])
        assert isinstance(mask, Mask)
        buffers[module.get_submodule(path), name] = mask.mask & ((value != 0) | raw.isfinite())
        with node.graph.inserting_before(node):
            kept = node.graph.get_attr(str(node.target))
            node.replace_all_uses_with(node.graph.call_function(torch.where, (kept, node.args[0], 0.0)))
        node.graph.erase_node(node)
    return buffers


def unmask_(model: nn.Module) -> nn.Module:
    """Undo capture and masking, in place, and leave the weights as they are."""
    modules = list(model.modules())
    for module in [m for m in modules if isinstance(m, Captured) and vars(m).get("keeps_graph")]:
        _without_masks(module)
    for module in modules:
        for name in [n for n, child in module._modules.items() if isinstance(child, Mask)]:
            delattr(module, name)
        if isinstance(module, Masked):
            _set_class(module, leaf_class(module))
        elif isinstance(module, Captured) and not vars(module).get("keeps_graph"):
            _uncapture(module)
    return model


def _without_masks(module: Captured) -> None:
    """Take the masks out of the graphs of a module whose own forward is not what it computes (a narrowed one)."""
    for graph in dict.fromkeys(module._graphs.values()):
        for node in [n for n in graph.nodes if n.op == "call_module"]:
            if isinstance(module.get_submodule(str(node.target)), Mask):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
    module.recompile()


def _uncapture(module: Captured) -> None:
    constants = {str(n.target) for g in module._graphs.values() for n in g.nodes if n.op == "get_attr"}
    for name in [n for n in module._buffers if n.startswith("_tensor_constant") and n in constants]:
        delattr(module, name)
    _set_class(module, user_class(module))
    for name in GRAPH_STATE:
        vars(module).pop(name, None)


def _set_class(module: Any, cls: type[nn.Module]) -> None:
    module.__class__ = cls
