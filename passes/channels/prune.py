"""Prune: take dead channels, which `passes.channels.dead` follows, out of the layers that have them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from passes.channels.constants import is_padded, sums, uses
from passes.channels.dead import Follower, Layer


@torch.no_grad()
def remove_dead_channels_(module: nn.Module, graph: fx.Graph, inputs: Sequence[Any]) -> None:
    """Remove the channels of a graph that do not matter, in place; what it computes stays the same.

    A channel goes where every layer that reads it has only zeros for it, or sees one number at every place, which is added to
    the layer's bias. Every layer keeps at least one channel.

    Args:
        module: the root of the graph, in evaluation mode, with real tensors.
        graph: what it runs in evaluation.
        inputs: arguments of the graph, in order; it runs on them once.
    """
    follower = Follower(module, graph)
    follower.run(*inputs)
    dead = _dead_classes(follower)
    for layer in follower.layers.values():
        ins = torch.tensor([c not in dead for c in follower.atoms.classes(layer.inputs)])
        outs = torch.tensor([c not in dead for c in follower.atoms.classes(layer.outputs)])
        _absorb(layer, ~ins)
        _slice(layer.module, ins, outs)


def _dead_classes(follower: Follower) -> set[int]:
    """Find the classes of channels that no reader needs; the fewest that keep one channel of every layer are left out."""
    atoms, layers = follower.atoms, list(follower.layers.values())
    kept = {atoms.find(atom) for atom in atoms.pinned}
    outs = [atoms.classes(layer.outputs) for layer in layers]
    readers = [(layer, atoms.classes(layer.inputs), out) for layer, out in zip(layers, outs, strict=True) if layer.reads]
    classes = {c for out in outs for c in out}
    while True:
        dead = _unneeded(classes - kept, readers)
        emptied = [out[0] for out in outs if all(c in dead for c in out)]
        if not emptied:
            return dead
        kept |= set(emptied)


def _unneeded(candidates: set[int], readers: list[tuple[Layer, list[int], list[int]]]) -> set[int]:
    """Return the candidates that no reader needs, given that it loses the outputs that are among them."""
    dead: set[int] = set()
    while True:
        needed: set[int] = set()
        for layer, ins, outs in readers:
            needs = _needs(layer, torch.tensor([c not in dead for c in outs]))
            needed.update(c for c, need in zip(ins, needs.tolist(), strict=True) if need)
        if (found := candidates - needed) == dead:
            return dead
        dead = found


def _needs(layer: Layer, rows: Tensor) -> Tensor:
    """Say of which inputs a layer needs more than their number: (inputs,) bool."""
    varies = layer.constants.isnan() | ((layer.constants != 0) & is_padded(layer.module))
    return uses(layer.module)[rows].any(0) & varies


def _absorb(layer: Layer, gone: Tensor) -> None:
    """Add what constant inputs that are removed contribute to a layer's bias."""
    module = layer.module
    if not layer.reads or not gone.any():
        return
    constants = torch.where(gone & ~layer.constants.isnan(), layer.constants, 0.0)
    added = (sums(module) @ constants).to(module.weight.device, module.weight.dtype)
    if added.any():
        bias = added if module.bias is None else module.bias + added
        module.bias = nn.Parameter(bias, module.weight.requires_grad)


def _slice(module: Any, ins: Tensor, outs: Tensor) -> None:
    """Leave the inputs and outputs that stay."""
    if bool(ins.all()) and bool(outs.all()):
        return
    if isinstance(module, _BatchNorm):
        module.num_features = int(outs.sum())
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if value is not None and value.dim():
                    table[name] = _like(value, value.detach()[outs])
        return
    depthwise = getattr(module, "groups", 1) > 1
    weight = module.weight.detach()[outs] if depthwise else module.weight.detach()[outs][:, ins]
    module.weight = _like(module.weight, weight.contiguous())
    if module.bias is not None:
        module.bias = _like(module.bias, module.bias.detach()[outs])
    if isinstance(module, nn.Linear):
        module.in_features, module.out_features = int(ins.sum()), int(outs.sum())
    else:
        module.in_channels, module.out_channels = int(ins.sum()), int(outs.sum())
        module.groups = module.out_channels if depthwise else 1


def _like(old: Any, new: Tensor) -> Any:
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
