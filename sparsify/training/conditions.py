"""Conditions: what has to hold before an updater is attached, and while it is."""

from collections.abc import Mapping

from torch import nn
from torch.optim import Optimizer

from passes.masking.mask import masks_of
from passes.shards import is_sharded
from sparsify.checks import check_whole
from sparsify.methods.method import Goal, Method
from sparsify.training import optimizers as opt
from sparsify.training.change import Bound

_LONGEST = 1_000_000  # steps: how far to look for a run with an update; a method may have none at any length


def check_attach(
    method: Method, goals: Mapping[str, Goal], model: nn.Module, optimizers: tuple[Optimizer, ...], total_steps: int
) -> None:
    """Raise unless the optimizers can drive a method's updates of this model for so many steps."""
    check_whole("total_steps", total_steps)
    _check_optimizers(optimizers)
    _check_schedule(method, total_steps)
    _check_weights(model, optimizers)
    masks = masks_of(model)
    for name, goal in ({} if method.counts_vary() else goals).items():
        if name in masks and masks[name].nonzeros != goal.target:
            raise ValueError(
                f"The mask of {name} keeps {masks[name].nonzeros} weights and should keep {goal.target}: it was written to, or "
                f"never filled (to_empty). Load a state_dict first, or sparsify again with masks=."
            )


def _check_optimizers(optimizers: tuple[Optimizer, ...]) -> None:
    if strange := [o for o in optimizers if not isinstance(o, Optimizer)]:
        raise ValueError(
            f"attach() takes torch.optim optimizers, one after the other, not {type(strange[0]).__name__}: "
            f"attach(optimizer, total_steps=...)."
        )
    if wrappers := [o for o in optimizers if isinstance(getattr(o, "optimizer", None), Optimizer)]:
        raise ValueError(
            f"attach() takes the optimizer itself, not {type(wrappers[0]).__name__} around it: attach before you wrap it, or "
            f"pass its attribute .optimizer."
        )
    if len(set(optimizers)) < len(optimizers):
        raise ValueError("attach() was given the same optimizer twice.")


def _check_schedule(method: Method, total_steps: int) -> None:
    if method.updates and not method.updates.steps(total_steps):
        least = next((t for t in range(total_steps, _LONGEST) if method.updates.steps(t)), None)
        raise ValueError(
            f"No update would ever run: method {method.name!r} has none within total_steps={total_steps}"
            f"{f'; the first comes with {least}' if least else ''}. Lower its interval or train longer; method='static' never "
            f"updates."
        )


def _check_weights(model: nn.Module, optimizers: tuple[Optimizer, ...]) -> None:
    """Raise unless the optimizers hold every masked weight, whole or sharded by fully_shard()."""
    own = {p for optimizer in optimizers for p in opt.parameters(optimizer)}
    weights = {name: (model.get_parameter(name), mask) for name, mask in masks_of(model).items()}
    flat = any(hasattr(parameter, "_is_flat_param") for parameter in model.parameters())
    if flat or any(weight.shape != mask.mask.shape for weight, mask in weights.values() if not mask.compressed):
        raise ValueError(
            "The model is sharded by FullyShardedDataParallel, which flattens its weights. Shard it by fully_shard() instead, "
            "then make the optimizer and attach."
        )
    if missing := [name for name, (weight, _) in weights.items() if weight.requires_grad and weight not in own]:
        raise ValueError(
            f"The optimizers do not hold {len(missing)} of {len(weights)} masked weights: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}. Make them from the sparsified model's parameters (after sparsify(), which "
            f"returns a copy, and after fully_shard(), which replaces them), pass all of them to one attach(), or freeze the "
            f"weight (requires_grad_(False))."
        )


def check_compressed(method: Method, model: nn.Module, optimizers: tuple[Optimizer, ...], *, alone: bool) -> None:
    """Raise unless compressed parameters, if there are any, can be trained.

    Args:
        method: of the updates.
        model: the masked model.
        optimizers: that train it.
        alone: whether no other process trains it too.
    """
    compressed = {name: model.get_parameter(name) for name, mask in masks_of(model).items() if mask.compressed}
    if not compressed:
        return
    name, out = next(iter(compressed)), "decompress(model) makes parameters whole again, before their optimizer is made"
    own = [o for o in optimizers if any(p in set(compressed.values()) for p in opt.parameters(o))]
    if strange := [type(o).__name__ for o in own if not opt.is_elementwise(o)]:
        raise ValueError(
            f"{name} is compressed, and {strange[0]} is not known to treat every element of a parameter by itself, as SGD and "
            f"Adam of torch.optim do; {out}."
        )
    updates = method.updates
    if method.prunes or (updates and (updates.momentum is not None or updates.dense_gradients == "always")):
        raise ValueError(f"{name} is compressed, and method {method.name!r} needs all of a weight or its gradient; {out}.")
    if any(is_sharded(p) for p in compressed.values()):
        raise ValueError(f"{name} is compressed and sharded over ranks; {out}, and sharded.")
    if not alone and method.counts_vary():
        raise ValueError(
            f"{name} is compressed, and method {method.name!r} changes how many values it has, which processes that train "
            f"together cannot follow; {out}."
        )


def check_bound(model: nn.Module, bound: list[Bound]) -> None:
    """Raise if a weight or its mask was replaced since the updater was attached.

    Raises:
        RuntimeError: naming the first.
    """
    masks = masks_of(model)
    for b in bound:
        if masks.get(b.name) is not b.mask or model.get_parameter(b.name) is not b.weight:
            raise RuntimeError(
                f"{b.name} was replaced while the updater is attached, as fully_shard() and load_state_dict(assign=True) do. "
                f"Call updater.detach(), make an optimizer for the model as it is now, and attach that."
            )
