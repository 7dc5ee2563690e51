"""Masking: the rewrite that makes a captured model use its weights through masks.

A weight is reached in two ways: a module whose own code reads its weights becomes
`Masked<class>`, which runs the original forward with its weights replaced; a weight that a graph reads itself goes
through a `call_module weight_mask` node on its way to the consumer, and once more where it is transformed before use.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from passes.capture import Capture, called_modules
from passes.mask import Mask, zero_dropped_
from passes.operands import reads
from passes.tracer import is_builtin


class MaskedLeaf(nn.Module):
    """Mixin: runs the original forward of a torch.nn module with its masked weights in place of the parameters."""

    _masked: tuple[str, ...]  # the weights, by their names inside this module ("weight", "out_proj.weight")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the module's own class."""
        parameters = []
        try:
            for name in self._masked:
                path, _, attribute = name.rpartition(".")
                owner = self.get_submodule(path) if path else self
                weight = owner._parameters[attribute]
                parameters.append((owner, attribute, weight))
                _replace(owner, attribute, getattr(owner, f"{attribute}_mask")(weight))
            return super().forward(*args, **kwargs)
        finally:
            for owner, attribute, weight in parameters:
                _replace(owner, attribute, weight)

    def __reduce__(self) -> tuple[Any, ...]:
        return _new_masked, (leaf_class(self),), self.__getstate__()


def _replace(owner: nn.Module, attribute: str, weight: Any) -> None:
    owner._parameters[attribute] = weight
    if isinstance(owner, nn.RNNBase):  # which reads its weights from a list beside its parameters
        owner._flat_weights[owner._flat_weights_names.index(attribute)] = weight


def leaf_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a masked torch.nn module had before."""
    return type(module).__bases__[1]


@functools.cache
def _masked_class(base: type[nn.Module]) -> type[MaskedLeaf]:
    @functools.wraps(base.forward)  # signature and module of the original, by which `is_builtin` goes
    def forward(self: MaskedLeaf, *args: Any, **kwargs: Any) -> Any:
        return MaskedLeaf.forward(self, *args, **kwargs)

    namespace = {"forward": forward, "__doc__": base.__doc__, "__module__": base.__module__}
    return type(f"Masked{base.__name__}", (MaskedLeaf, base), namespace)


def _new_masked(base: type[nn.Module]) -> MaskedLeaf:
    return nn.Module.__new__(_masked_class(base))


def mask_weights(model: nn.Module, capture: Capture, masks: Mapping[str, Mask]) -> nn.Module:
    """Rewrite a model and its captured graphs, in place, so that every weight in `masks` is used through its mask.

    Kept weights keep their values and dropped ones become 0. A mask is stored as the child `<weight>_mask` of every
    module that owns the weight, tied weights sharing one. Rewritten nodes are renamed `masked_...`.

    Args:
        model: the module that `capture` was traced from.
        capture: its graphs, not installed yet.
        masks: {parameter name: mask}.

    Returns:
        The same object.
    """
    by_weight = {model.get_parameter(name): mask for name, mask in masks.items()}
    for module in list(model.modules()):
        for attribute, weight in module._parameters.items():
            if weight is not None and weight in by_weight:
                module.add_module(f"{attribute}_mask", by_weight[weight])
    for weight, mask in by_weight.items():
        if not weight.is_meta:
            with torch.no_grad():
                zero_dropped_(weight, mask.mask)
        mask.train(model.training)
    for path in capture.leaves:
        _mask_leaf(model.get_submodule(path), by_weight)
    for path in capture.opaque:
        _mask_own(model.get_submodule(path), by_weight)
    for path, region in capture.regions.items():
        module = model.get_submodule(path)
        hidden = {target for target, leaf in called_modules(module, region.graphs) if _mask_leaf(leaf, by_weight)}
        for graph in dict.fromkeys(region.graphs.values()):
            _mask_transformed(module, graph, by_weight)
            _mask_reads(module, graph, by_weight)
            for node in [n for n in graph.nodes if n.op == "call_module" and n.target in hidden]:
                _rename_masked(node, node.name)
    return model


def _mask_leaf(leaf: nn.Module, masks: Mapping[nn.Parameter, Mask]) -> bool:
    """Make a torch.nn module run with its weights masked, and tell whether it has any."""
    return is_builtin(leaf) and _set_masked(leaf, tuple(name for name, p in leaf.named_parameters() if p in masks))


def _mask_own(module: nn.Module, masks: Mapping[nn.Parameter, Mask]) -> None:
    """Make a module whose Python code reads its own parameters run with them masked."""
    _set_masked(module, tuple(name for name, p in module.named_parameters(recurse=False) if p in masks))


def _set_masked(module: nn.Module, names: tuple[str, ...]) -> bool:
    if names and not isinstance(module, MaskedLeaf):
        module.__class__ = _masked_class(type(module))
        vars(module)["_masked"] = names
    return bool(names)


def _mask_transformed(module: nn.Module, graph: fx.Graph, masks: Mapping[nn.Parameter, Mask]) -> None:
    paths = {p: name for name, p in module.named_parameters(remove_duplicate=False)}
    values = {read.value: read.weight for read in reads(module, graph) if read.value and read.weight in masks}
    for value, weight in values.items():
        users = list(value.users)
        with graph.inserting_after(value):
            masked = graph.call_module(f"{paths[weight]}_mask", (value,), {"transformed": True})
        _rename_masked(masked, value.name)
        for user in users:
            user.replace_input_with(value, masked)


def _mask_reads(module: nn.Module, graph: fx.Graph, masks: Mapping[nn.Parameter, Mask]) -> None:
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        path, _, attribute = str(node.target).rpartition(".")
        weight = module.get_submodule(path)._parameters.get(attribute)
        if weight is None or weight not in masks:
            continue
        users = list(node.users)
        with graph.inserting_after(node):
            masked = graph.call_module(f"{node.target}_mask", (node,))
        _rename_masked(masked, node.name)
        for user in users:
            user.replace_input_with(node, masked)


def _rename_masked(node: fx.Node, name: str) -> None:
    node._rename(f"masked_{name.lstrip('_')}")
