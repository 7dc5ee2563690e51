"""Computed: the values of a graph's nodes that parameters and constants alone decide."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg


class Computed:
    """Computes values that are derived from parameters alone, each once.

    Args:
        module: whose graph the nodes are of.
        constants: tensors that the graph reads, by attribute name, where the module does not have them yet.
        meta: whether on the meta device, without data.
    """

    def __init__(self, module: nn.Module, constants: Mapping[str, Tensor] | None = None, meta: bool = True) -> None:
        self.module, self.constants, self.meta = module, constants or {}, meta
        self._values: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        """Return the value of a node."""
        if node not in self._values:
            self._values[node] = self._compute(node)
        return self._values[node]

    def _compute(self, node: fx.Node) -> Any:
        target: Any = node.target
        if node.op == "get_attr":
            path, _, attribute = target.rpartition(".")
            constant = self.constants.get(target)
            value = getattr(self.module.get_submodule(path), attribute) if constant is None else constant
            return torch.empty_like(value, device="meta") if self.meta and isinstance(value, Tensor) else value
        args, kwargs = map_arg((node.args, node.kwargs), self.value)
        if node.op == "call_module":
            called = self.module.get_submodule(target)
            return (copy.deepcopy(called).to("meta").eval() if self.meta else called)(*args, **kwargs)
        if isinstance(target, str):
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)
