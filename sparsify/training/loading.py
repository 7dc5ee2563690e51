"""Loading: what has to hold before a state_dict is taken over, and what follows from it, or from other writes, afterwards."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from passes.masking.mask import Mask, masks_of, zero_dropped_weights_
from sparsify.methods.method import Goal, Method
from sparsify.training.base import UpdaterBase
from sparsify.training.lookup import updater_of
from sparsify.training.state import State


def check_before_load(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Refuse masks that do not fit, before anything is loaded."""
    masks = masks_of(model)
    _check_same_masks(model, {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)})
    names = {mask: name for name, mask in masks.items()}
    saved = {
        names[mask]: state_dict[key]
        for path, mask in model.named_modules(remove_duplicate=False)
        if isinstance(mask, Mask) and mask in names and (key := f"{prefix}{path}.mask") in state_dict
    }
    for name, mask in saved.items():
        own = masks[name].mask
        if mask.shape != own.shape or mask.dtype != torch.bool:
            found = f"{tuple(mask.shape)} {mask.dtype}"
            raise ValueError(f"The state_dict's mask of {name} is {found}, the model's is {tuple(own.shape)} torch.bool.")
    state, updater = state_dict.get(f"{prefix}updater._extra_state"), updater_of(model)
    counts = _check_training(updater, State.decode(state)) if state is not None and updater is not None else {}
    for name, mask in saved.items():
        if mask.is_meta:
            continue
        total = int(mask.sum())
        if total == 0 or total != counts.get(name, total):
            says = f"its own count says {counts[name]}" if name in counts else "at least one of every layer must stay"
            raise ValueError(
                f"The state_dict's mask of {name} keeps {total} weights, {says}: the file is damaged or was edited."
            )
        goal = updater.goals.get(name) if updater is not None else None
        if updater is not None and goal is not None and not updater.method.layout.allows(mask, goal.out_dim):
            raise ValueError(
                f"The state_dict's mask of {name} does not follow the layout {updater.method.layout.name}, which the model's "
                f"method keeps. Load it into a model with method='static' or 'rigl'."
            )


def _check_training(updater: UpdaterBase, state: State) -> dict[str, int]:
    """Raise if a state_dict is of another method or density; return the counts that it says its masks have."""
    otherwise = "or take over its masks alone: sparsify(model, masks={parameter name: mask})"
    if len(state.nonzeros) != len(updater.goals):
        raise ValueError(f"The state_dict is of {len(state.nonzeros)} masked weights, the model has {len(updater.goals)}.")
    if state.method != updater.method.name:
        raise ValueError(
            f"The state_dict was trained by method {state.method!r}, the model's is {updater.method.name!r}. Sparsify with "
            f"method={state.method!r} to go on, {otherwise}."
        )
    for (name, goal), target in zip(updater.goals.items(), state.targets, strict=True):
        if goal.target != target:
            raise ValueError(
                f"The state_dict is of another density or distribution; the first difference is {name}: it is to keep "
                f"{target} weights there and {goal.target} here. Sparsify as for the checkpoint to go on, {otherwise}."
            )
    return dict(zip(updater.goals, state.nonzeros, strict=True))


def settle_after_load(model: nn.Module, incompatible_keys: Any) -> None:
    """Make counts, zeros and the updater follow what was loaded."""
    zero_dropped_weights_(model)
    updater = updater_of(model)
    if updater is None:
        return
    missing = incompatible_keys.missing_keys
    masks = [n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, Mask)]
    loaded = sum(key.endswith("_mask.mask") for key in missing) < len(masks)  # of tied ones perhaps under one name only
    alone = any(k.endswith("updater._extra_state") for k in missing) and loaded
    if alone and not updater.method.prunes:  # masks without their training: what they keep is the goal from now on
        counts = updater.nonzeros
        updater.goals = {n: replace(goal, target=counts.get(n, goal.target)) for n, goal in updater.goals.items()}
    updater.renew()


def settle_unattended(model: nn.Module, goals: Mapping[str, Goal]) -> None:
    """See whether something wrote past the masks that no attached optimizer keeps, or averaged them.

    Args:
        model: the masked model.
        goals: {parameter name: goal} of the masks that always keep the same number of weights.
    """
    averaged = []
    for name, mask in masks_of(model).items():
        if not mask.attended and not mask.mask.is_meta:
            mask.belongs_to(weight := model.get_parameter(name))
            mask.look(weight)
            averaged += [(name, mask.nonzeros)] if name in goals and mask.nonzeros != goals[name].target else []
    for name, count in averaged[:1]:
        warnings.warn(
            f"The mask of {name} keeps {count} weights and should keep {goals[name].target}: it was written to, or averaged "
            f"(AveragedModel does that with use_buffers=True; with False it copies masks, and they stay as sparse).",
            stacklevel=4,
        )


def changed_schedule(method: Method, step: int, before: int, after: int) -> str:
    """Say what a change of the total steps does to the schedule of a method that has come to a step."""
    text = f"total_steps was {before} up to step {step} and is {after} from here on."
    if (updates := method.updates) is None:
        return text
    old, new = updates.steps(before), updates.steps(after)
    ends = f"The last update moves from step {updates.last(before)} to {updates.last(after)}"
    coming = next((t for t in new if t > step), None)
    if coming is None:
        return f"{text} {ends}: none is left."
    if not old:
        return f"{text} {ends}; the next one is at step {coming}."
    amounts = [updates.amount(min(coming, total), total) for total in (before, after)]
    what = "share of the final sparsity" if method.prunes else "drop fraction"
    return f"{text} {ends}, and the {what} at the next one, step {coming}, from {amounts[0]:.3g} to {amounts[1]:.3g}."


def _check_same_masks(model: nn.Module, keys: set[str]) -> None:
    """Raise if a state_dict has masks for other weights. Of tied ones, the name of one is enough: some files store no more."""
    found = {key for key in keys if key.endswith("_mask.mask")}
    own: dict[str, Mask] = {f"{n}.mask": m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, Mask)}
    there = {own[key] for key in found & own.keys()}
    different = sorted((found - own.keys()) | {key for key, mask in own.items() if mask not in there})
    if found and different:
        name, where = different[0].removesuffix("_mask.mask"), "state_dict" if different[0] in found else "model"
        raise ValueError(
            f"The state_dict masks other weights than the model does; the first is {name}, masked in the {where} only. "
            f"Sparsify the model with the distribution and patterns that the checkpoint was made with."
        )
