"""Fold: a masked model back to the plain dense one it was made from, with the masks baked into the weights."""

from typing import Any

from torch import nn

from passes.captured import Captured, user_class
from passes.mask import Mask, zero_dropped_weights_
from passes.masking import Masked, leaf_class

_GRAPH_STATE = (
    "_arguments",
    "_through",
    "_graphs",
    "_forwards",
    "meta",
    "shape_env",
    "_tracer_cls",
    "_tracer_extras",
    "_deepcopy_hooks",
)
_GRAPH_HOOKS = ("_replace_hooks", "_create_node_hooks", "_erase_node_hooks")


def fold_(model: nn.Module) -> nn.Module:
    """Undo capture and masking, in place: every module gets its own class and forward back, dropped weights stay 0.

    Args:
        model: a captured and masked model.

    Returns:
        The same object, with the classes, parameters and state_dict keys of the original model.
    """
    zero_dropped_weights_(model)
    return unmask_(model)


def unmask_(model: nn.Module) -> nn.Module:
    """Undo capture and masking, in place, and leave the weights as they are."""
    masks = {path for path, module in model.named_modules(remove_duplicate=False) if isinstance(module, Mask)}
    for module in list(model.modules()):
        for name in [n for n, child in module._modules.items() if isinstance(child, Mask)]:
            delattr(module, name)
        if isinstance(module, Masked):
            _set_class(module, leaf_class(module))
        elif isinstance(module, Captured):
            if vars(module).get("keeps_graph"):
                _without_masks(module, masks)
            else:
                _uncapture(module)
    return model


def _without_masks(module: Captured, masks: set[str]) -> None:
    """Take the masks out of the graphs of a module whose own forward is not what it computes (a narrowed one)."""
    for graph in dict.fromkeys(module._graphs.values()):
        for node in [n for n in graph.nodes if n.op == "call_module" and str(n.target) in masks]:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    module.recompile()


def _uncapture(module: Captured) -> None:
    constants = {str(n.target) for g in module._graphs.values() for n in g.nodes if n.op == "get_attr"}
    for name in [n for n in module._buffers if n.startswith("_tensor_constant") and n in constants]:
        delattr(module, name)
    _set_class(module, user_class(module))
    for name in (*_GRAPH_STATE, *_GRAPH_HOOKS):
        vars(module).pop(name, None)


def _set_class(module: Any, cls: type[nn.Module]) -> None:
    module.__class__ = cls
