"""Compressed: parameters that hold their kept weights only, and with them gradients and what optimizers keep.

A compressed parameter is (kept, 1), in the order of `weight[mask]`. A `state_dict` shows it whole, so that files know nothing
of it, and code of the model's own that reads it gets it whole, as a new tensor.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from passes.capture.host import Host
from passes.kernels.compiler import native
from passes.kernels.values import expand, gather, give_values
from passes.masking.kernels import fuse_where_sparse
from passes.masking.mask import Mask, masks_of
from passes.masking.products import why_masked
from passes.shards import refuse_shards

_MOST = 0.5  # density, from which on values with their places take as much as the weight


def compress(model: nn.Module) -> nn.Module:
    """Let the masked parameters of a model hold their kept values only, in place, before its optimizer is made.

    Memory of weights, gradients and optimizer states becomes proportional to density, and optimizers' steps take as much less
    time. Layers that can train with `kernels="sparse"`, of density below 0.5, are compressed and do so from then on; also in
    evaluation, or with the whole weight made anew where Python code calls them. All others stay as they are. Parameters keep
    their names, and become (kept, 1). A `state_dict`, and that of an optimizer while the updater is attached, have everything
    whole: a run goes on with or without.

    Args:
        model: a masked model on the CPU.

    Returns:
        The model.

    Raises:
        ValueError: the model has no masks, or none of its layers can be compressed; it is sharded.
        RuntimeError: an optimizer is attached.

    Example:
        >>> from sparsify import sparsify
        >>> model = compress(sparsify(nn.Sequential(nn.Linear(64, 64)), density=0.1))
        >>> [tuple(p.shape) for p in model.parameters()], tuple(model.state_dict()["0.weight"].shape)
        ([(410, 1), (64,)], (64, 64))
    """
    masks = masks_of(model)
    _check_detached(masks, "compress")
    refuse_shards(model)
    owners: dict[Any, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners.setdefault(parameter, []).append(module)
    problems = {name: _problem(owners[model.get_parameter(name)], mask) for name, mask in masks.items()}
    if not masks or all(problems.values()):
        first = next((f"{name} cannot: {why}" for name, why in problems.items()), "it has no masks")
        raise ValueError(f"compress() takes a model with masked layers that can train with kept values only; {first}.")
    for name in [name for name, why in problems.items() if not why]:
        weight, mask = model.get_parameter(name), masks[name]
        give_values(weight, gather(weight.detach(), mask.mask))
        weight.grad = None
        mask.compressed, mask.kernels = True, "sparse"
        mask.settle_places()
        mask.check_places()
    return fuse_where_sparse(model)


def decompress(model: nn.Module) -> nn.Module:
    """Make compressed parameters whole again, in place, with zeros where masks drop.

    Args:
        model: any masked model.

    Returns:
        The model.

    Raises:
        RuntimeError: an optimizer is attached.
    """
    masks = masks_of(model)
    _check_detached(masks, "decompress")
    for name, mask in masks.items():
        if mask.compressed:
            weight = model.get_parameter(name)
            mask.check_places()
            give_values(weight, expand(weight.detach(), mask.mask))
            weight.grad = None
            mask.compressed = False
    return model


def _check_detached(masks: dict[str, Mask], name: str) -> None:
    if any(mask.attended for mask in masks.values()):
        raise RuntimeError(f"{name}() changes parameters that an optimizer holds: call it before attach(), or detach() first.")


def _problem(owners: list[nn.Module], mask: Mask) -> str:
    """Return why a parameter cannot be compressed, or nothing."""
    if len(owners) > 1:
        return "several layers share it"
    if mask.compressed:
        return "it is compressed already"
    if native() is None:
        return "there are no native loops: they need a C++ compiler, pip install 'sparsify-fx[kernels]'"
    module = owners[0]
    if not isinstance(module, Host) or module._modules.get("weight_mask") is not mask:
        return "code reads it under another name"
    if why := why_masked(module):
        return f"these layers train masked, since {why}"
    return "its density is 0.5 or more, as while a method that prunes starts" if mask.density >= _MOST else ""


@contextlib.contextmanager
def spread(tensor: Tensor, before: Tensor, mask: Mask) -> Iterator[Tensor]:
    """Give the whole of a tensor of values, to be written to, and take the values that the mask keeps afterwards.

    Args:
        tensor: a parameter or what belongs to it, (kept, 1) if the parameter is compressed; others are given as they are.
        before: the mask as it was for these values.
        mask: the mask as it is to be.
    """
    if not mask.compressed:
        yield tensor
        return
    whole = expand(tensor.detach(), before)
    yield whole
    values = gather(whole, mask.mask)
    if values.shape == tensor.shape:
        tensor.data.copy_(values)
    else:
        give_values(tensor, values)
