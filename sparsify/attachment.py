"""Attachment: one optimizer, the masked weights it trains, and what its hooks do at every step."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from passes.mask import any_dropped, masks_of, zero_dropped_
from sparsify import optimizers as opt
from sparsify.checks import check_whole
from sparsify.scores import LayerState
from sparsify.update import Bound, observe, update_layers

if TYPE_CHECKING:
    from sparsify.updater import Updater


class Attachment:
    """One optimizer, the masked weights it trains, and how many steps it has taken.

    Args:
        updater: of the model; it holds method, schedule and everything that a `state_dict` has to hold.
        model: the masked model.
        optimizer: made from the model's parameters.
        step: the optimizer steps taken so far.
    """

    def __init__(self, updater: "Updater", model: nn.Module, optimizer: Optimizer, step: int) -> None:
        self.updater, self.model, self.optimizer, self.step = updater, model, optimizer, step
        self._idle = False  # whether the step under way is none of training
        self._new = True  # whether weights, masks or state may have come from elsewhere since the last step
        self._look = True  # whether to look for gradients of dropped weights
        self._looked = False  # whether that was done since
        self._bind()
        _zero_all_dropped(self.bound)  # whoever initialized the weights anew after sparsify() did not know of masks
        # Python decides what a step does, in compiled steps too.
        self._handles = (
            optimizer.register_step_pre_hook(_not_compiled(self._before_step)),
            optimizer.register_step_post_hook(_not_compiled(self._after_step)),
        )

    def _bind(self) -> None:
        """Find the masked weights among the optimizer's parameters."""
        self.groups = opt.group_sizes(self.optimizer)
        own = set(opt.parameters(self.optimizer))
        weights = {name: (self.model.get_parameter(name), mask) for name, mask in masks_of(self.model).items()}
        self.bound = [Bound(name, weight, mask) for name, (weight, mask) in weights.items() if weight in own]
        # Those that an ordinary step may move off 0.
        known = opt.keeps_zeros(self.optimizer)
        self._corrected = [b for b in self.bound if not known or self.updater.is_exposed(b.name)]
        self._versions: list[int] = []  # of the weights after the last step; every write in place raises them
        for b in self.bound:
            b.mask.is_copy = False

    def remove(self) -> None:
        """Let go of the optimizer."""
        self._set_dense_gradients(False)
        for handle in self._handles:
            handle.remove()

    def settle(self) -> None:
        """Derive from the step whether the next gradients have to be dense."""
        self._set_dense_gradients(self._dense_at(self.step + 1))

    def renew(self) -> None:
        """Before the next step, look at weights, masks and state as if just attached: something was loaded."""
        self._new = self._look = True
        self._looked = False
        self.settle()

    def _set_dense_gradients(self, dense: bool) -> None:
        for b in self.bound:
            b.mask.dense_gradient = dense

    def _updates_at(self, step: int) -> bool:
        updates = self.updater.method.updates
        return updates is not None and step in updates.steps(self.updater.total_steps)

    def _dense_at(self, step: int) -> bool:
        updates = self.updater.method.updates
        return updates is not None and updates.dense_at(step, self.updater.total_steps)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._idle = opt.is_idle(optimizer, args, kwargs)
        if self._idle:
            return None
        if self.groups != opt.group_sizes(optimizer):  # add_param_group
            self._bind()
            self.settle()
        if self._new:
            _check_bound(self.model, self.bound)
            self.updater.compare_once()
        self._mask_what_others_wrote()
        return opt.before_step(optimizer, args, kwargs, self._act)

    @torch.no_grad()
    def _mask_what_others_wrote(self) -> None:
        """Set dropped weights back to 0 where something else than a step wrote to them, and their state if it may be new."""
        versions = [b.weight._version for b in self.bound]
        for b, version, own in zip(self.bound, versions, self._versions or [-1] * len(versions), strict=True):
            if version != own:
                zero_dropped_(b.weight, b.mask.mask)
            if self._new and not opt.stands_still(self.optimizer):
                for tensor in opt.state_tensors(self.optimizer, b.weight):
                    zero_dropped_(tensor, b.mask.mask)

    @torch.no_grad()
    def _act(self) -> None:
        """Do what a step does instead of the optimizer's, or before it; the gradients are there."""
        updates, step = self.updater.method.updates, self.step + 1
        if self._look and not self._dense_at(step):
            self._look_for_strays()
        if updates is None or step > updates.steps(self.updater.total_steps)[-1]:
            return
        if updates.momentum is not None or updates.dense_gradients == "always":
            for b in self.bound:
                observe(updates, b, self.updater.momentum(b.name), self.optimizer)
        if updates.replaces_step() and self._updates_at(step):
            self._idle = not self._update(step)
            opt.skip_step(self.optimizer)

    def _look_for_strays(self) -> None:
        """From now on correct weights after every step if their gradient is not 0 where they are dropped.

        Something writes to gradients then, as penalties and hooks do. Where ranks were seen to agree before and gradients were
        clean, it is the ranks' masks that differ: what one drops and another keeps has the mean of their gradients.
        """
        gradients = [(b, opt.dense_gradient(self.optimizer, b.weight)) for b in self.bound if b not in self._corrected]
        strays = [b for b, gradient in gradients if gradient is not None and any_dropped(gradient, b.mask.mask)]
        if strays and self._looked and self.updater.trains_with_others():
            raise RuntimeError(
                f"{strays[0].name} has a gradient where it is dropped, which it had not before the last update. Ranks hold "
                f"different masks, which updater.compare_ranks() names and updater.synchronize() mends; or something writes to "
                f"gradients since then, which is corrected after updater.detach(keep_step=True) and attach()."
            )
        self._corrected += strays
        self._look, self._looked = False, True

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        opt.end_skip(optimizer)
        if self._idle:
            return
        self.step += 1
        self._new = False
        step, updates = self.step, self.updater.method.updates
        changes = self._updates_at(step)
        if not (changes and updates and updates.replaces_step()):
            _zero_all_dropped(self._corrected)
            if changes:
                self._update(step)
        if changes:
            opt.forget_history(optimizer)
            self._look = self.updater.skipped.device.type == "cpu"  # elsewhere looking would wait for the device
        if self._dense_at(step + 1) != self._dense_at(step):
            self.settle()
        self._versions = [b.weight._version for b in self.bound]

    def _update(self, step: int) -> bool:
        """Change the topology, after an ordinary step or instead of it; False if that has to be tried again."""
        method = self.updater.method
        assert method.updates is not None
        _check_bound(self.model, self.bound)
        layers = [(b, state) for b in self.bound if (state := self._state(b, step))]
        amount = method.updates.amount(step, self.updater.total_steps)
        done = update_layers(method, layers, amount, self.optimizer, self.updater.skipped)
        if done:
            self.updater.record(step)
        return done

    def _state(self, b: Bound, step: int) -> LayerState | None:
        """Return what the update sees of a weight; None if there is nothing to change or to go by."""
        method, goal, mask = self.updater.method, self.updater.goals[b.name], b.mask
        assert method.updates is not None
        if not b.weight.requires_grad:
            return None
        if goal.target == mask.mask.numel() and not method.prunes:  # which may prune by one threshold for all layers
            return None
        gradient = None
        if method.updates.replaces_step():
            gradient = opt.dense_gradient(self.optimizer, b.weight)
            if gradient is None and method.prunes:
                raise RuntimeError(
                    f"{b.name} has no gradient, by which method {method.name!r} prunes in this step. Call backward() on the "
                    f"loss of a batch before optimizer.step(), or freeze the weight (requires_grad_(False))."
                )
            if gradient is None:
                return None
        return LayerState(
            b.name,
            b.weight,
            mask.mask,
            nonzeros=mask.nonzeros,
            target=goal.target,
            unit=goal.unit,
            out_dim=goal.out_dim,
            gradient=gradient,
            momentum=self.updater.momentum(b.name),
            step=step,
            seed=self.updater.seed,
        )


_LONGEST = 1_000_000  # steps: how far to look for a run with an update, since a record may have none at any length


def _not_compiled(hook: Callable[..., Any]) -> Any:
    return torch.compiler.disable(hook)


def check_attach(updater: "Updater", model: nn.Module, optimizers: tuple[Optimizer, ...], total_steps: int) -> None:
    """Raise unless the optimizers can drive the updates of this model for so many steps."""
    method = updater.method
    check_whole("total_steps", total_steps)
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
    if method.updates and not method.updates.steps(total_steps):
        least = next((t for t in range(total_steps, _LONGEST) if method.updates.steps(t)), None)
        raise ValueError(
            f"No update would ever run: method {method.name!r} has none within total_steps={total_steps}"
            f"{f'; the first comes with {least}' if least else ''}. Lower its interval or train longer; method='static' never "
            f"updates."
        )
    if any(hasattr(parameter, "_is_flat_param") for parameter in model.parameters()):
        raise ValueError(
            "The model is sharded by FullyShardedDataParallel, which flattens its weights. Shard it by fully_shard() instead, "
            "then make the optimizer and attach."
        )
    masks = masks_of(model)
    for name, goal in ({} if method.counts_vary() else updater.goals).items():
        if name in masks and masks[name].nonzeros != goal.target:
            raise ValueError(
                f"The mask of {name} keeps {masks[name].nonzeros} weights and should keep {goal.target}: it was written to, or "
                f"never filled (to_empty). Load a state_dict first, or sparsify again with masks=."
            )
    own = {p for optimizer in optimizers for p in opt.parameters(optimizer)}
    weights = {name: model.get_parameter(name) for name in masks}
    if views := [name for name, weight in weights.items() if weight.shape != masks[name].mask.shape]:
        raise ValueError(
            f"{views[0]} has the shape {tuple(weights[views[0]].shape)} and its mask {tuple(masks[views[0]].mask.shape)}, as "
            f"FullyShardedDataParallel leaves it. Shard the model by fully_shard() instead, then make the optimizer and attach."
        )
    if missing := [name for name, weight in weights.items() if weight.requires_grad and weight not in own]:
        raise ValueError(
            f"The optimizers do not hold {len(missing)} of {len(weights)} masked weights: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}. Make them from the sparsified model's parameters (after sparsify(), which "
            f"returns a copy, and after fully_shard(), which replaces them), pass all of them to one attach(), or freeze the "
            f"weight (requires_grad_(False))."
        )


def _check_bound(model: nn.Module, bound: list[Bound]) -> None:
    masks = masks_of(model)
    for b in bound:
        if masks.get(b.name) is not b.mask or model.get_parameter(b.name) is not b.weight:
            raise RuntimeError(
                f"{b.name} was replaced while the updater is attached, as fully_shard() and load_state_dict(assign=True) do. "
                f"Call updater.detach(), make an optimizer for the model as it is now, and attach that."
            )


@torch.no_grad()
def _zero_all_dropped(bound: list[Bound]) -> None:
    """Set every dropped weight back to 0, after an optimizer that may have moved them."""
    for b in bound:
        zero_dropped_(b.weight, b.mask.mask)
