"""Ranks: the processes of distributed training hold the same masks, and are compared instead of being told every step."""

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from passes.masking.mask import Mask, masks_of
from passes.shards import is_sharded, local, own_part
from sparsify.training.base import UpdaterBase
from sparsify.training.change import Bound

_IGNORED = "_ddp_params_and_buffers_to_ignore"  # where DistributedDataParallel looks


def ignore_in_ddp(model: nn.Module, ignore: bool = True) -> None:
    """Tell DistributedDataParallel to leave masks and updaters' buffers out of its broadcast before every forward.

    `sparsify` does so for the model that it returns. Where that model is part of another module, which DDP is to wrap, call
    this for the other one; otherwise masks are right and sent in vain.

    Args:
        model: the module that DDP will wrap.
        ignore: False takes it back.

    Example:
        >>> from sparsify import sparsify
        >>> outer = nn.Sequential(sparsify(nn.Sequential(nn.Linear(8, 8)), density=0.5))
        >>> ignore_in_ddp(outer)
        >>> outer._ddp_params_and_buffers_to_ignore
        ['0.0.weight_mask.mask', '0.updater.skipped']
    """
    paths = [path for path, module in model.named_modules() if isinstance(module, (Mask, UpdaterBase))]
    own = [f"{path}.{name}" for path in paths for name, _ in model.get_submodule(path).named_buffers()]
    others = [name for name in vars(model).pop(_IGNORED, ()) if name not in own]
    if names := [*others, *own] if ignore else others:
        vars(model)[_IGNORED] = names


def check_same(updater: UpdaterBase, model: nn.Module, group: Any) -> None:
    """Raise on every rank unless all hold the same masks, schedule and step.

    Args:
        updater: of the model.
        model: the masked model.
        group: the process group to compare; None is the default one.

    Raises:
        RuntimeError: naming the first difference.
    """
    own = _facts(updater, model)
    others: list[Any] = [None] * dist.get_world_size(group)
    with _on_device_of(model):
        dist.all_gather_object(others, own, group)
    for rank, facts in enumerate(others):
        for name in dict.fromkeys([*others[0], *facts]):
            if facts.get(name) != others[0].get(name):
                raise RuntimeError(
                    f"Ranks 0 and {rank} would train different networks; the first difference is {name}. Call sparsify() "
                    f"with the same model, arguments and seed on every rank and load the same checkpoint on all of them, or "
                    f"call updater.synchronize() on every rank, which copies from the one that has taken most steps."
                )


def mean(tensor: Tensor, group: Any) -> Tensor:
    """Return the mean of a tensor over ranks, each of which has to call it."""
    total = tensor.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)


def check_drift(seen: Iterable[tuple[Bound, Tensor]]) -> None:
    """Raise if gradients of an ordinary step show that ranks hold different masks.

    What one rank drops and another keeps gets the mean of their gradients, so that a few dropped weights have one. Hooks,
    penalties and compression give one to many.

    Args:
        seen: masked weights with their gradients.

    Raises:
        RuntimeError: naming the first weight.
    """
    for b, gradient in seen:
        mask = own_part(b.mask.mask, gradient)
        own = local(gradient)
        there = own.gt(-math.inf).logical_and_(own.lt(math.inf)).logical_and_(own.ne(0))  # neither 0 nor NaN nor inf
        dropped, kept = (int((there & part).sum()) for part in (~mask, mask))
        if dropped and 2 * dropped * int(mask.sum()) < kept * int((~mask).sum()):
            raise RuntimeError(
                f"{b.name} has gradients where it is dropped. The masks of the ranks differ: updater.compare_ranks() names the "
                f"first difference, and updater.synchronize(), on every rank, mends it. Or something has written to a few "
                f"gradients since the last look: call updater.detach(keep_step=True), and attach() again."
            )


def _facts(updater: UpdaterBase, model: nn.Module) -> dict[str, Any]:
    facts = {"the method": updater.method.name, "total_steps": updater.total_steps, "the step": updater.step}
    facts |= {"the seed": updater.seed, "the schedule": updater.method.schedule(updater.total_steps)}
    for name, mask in masks_of(model).items():
        facts[f"the mask of {name}"] = (mask.nonzeros, mask.digest())
    return facts


@torch.no_grad()
def take_over(updater: UpdaterBase, model: nn.Module, optimizers: list[Optimizer], group: Any) -> None:
    """Give every rank what the rank that has taken most steps holds: weights, masks, state of updater and optimizers."""
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise ValueError("synchronize() is for whole models on every rank; shards of one model cannot go different ways.")
    steps: list[Any] = [None] * dist.get_world_size(group)
    state: list[Any] = [updater.get_extra_state(), *(optimizer.state_dict() for optimizer in optimizers)]
    with _on_device_of(model):
        dist.all_gather_object(steps, updater.step, group)
        source = steps.index(max(steps))
        source = dist.get_global_rank(group, source) if group is not None else source
        dist.broadcast_object_list(state, source, group)
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor, source, group)
    for mask in masks_of(model).values():
        mask.settle_places()
    if dist.get_rank() != source:
        updater.set_extra_state(state[0])
        for optimizer, loaded in zip(optimizers, state[1:], strict=True):
            optimizer.load_state_dict(loaded)


def _on_device_of(model: nn.Module) -> Any:
    """NCCL sends objects from the current GPU, which need not be the model's."""
    device = next(iter(masks_of(model).values())).mask.device
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
