"""Hooks: one optimizer, the masked weights it trains, and what happens before and after each of its steps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from passes.kernels.pending import end_step, forget, keep
from passes.masking.mask import masks_of, trace_of
from passes.masking.zeros import has_stray, zero_dropped_
from sparsify.methods.scores import LayerState
from sparsify.training import optimizers as opt
from sparsify.training import ranks
from sparsify.training.base import UpdaterBase
from sparsify.training.change import Bound, observe, update_layers
from sparsify.training.compressed import WholeGradient, WholeWeight, gather_state, largest, with_whole_state
from sparsify.training.conditions import check_bound

_EVERY = 100  # steps between looks at gradients, where looking does not wait for the device


class OptimizerHooks:
    """One optimizer, the masked weights it trains, and how many steps it has taken.

    Args:
        updater: of the model; it holds method, schedule and everything that a `state_dict` has to hold.
        model: the masked model.
        optimizer: made from the model's parameters.
        step: the optimizer steps taken so far.
    """

    def __init__(self, updater: UpdaterBase, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        self.updater, self.model, self.optimizer, self.step = updater, model, optimizer, step
        self._counts = True  # whether the step under way is one of training
        self._bind()
        # Python decides what a step does, in compiled steps too.
        self._handles = (
            optimizer.register_step_pre_hook(_not_compiled(self._before_step)),
            optimizer.register_step_post_hook(_not_compiled(self._after_step)),
            optimizer.register_load_state_dict_post_hook(lambda _: self.renew()),
            optimizer.register_state_dict_post_hook(lambda own, state: with_whole_state(own, self.bound, state)),
        )

    def _bind(self) -> None:
        """Find the masked weights among the optimizer's parameters, and keep them masked from now on."""
        self.groups = opt.group_sizes(self.optimizer)
        own = set(opt.parameters(self.optimizer))
        weights = {name: (self.model.get_parameter(name), mask) for name, mask in masks_of(self.model).items()}
        self.bound = [Bound(name, weight, mask) for name, (weight, mask) in weights.items() if weight in own]
        for b in self.bound:
            b.mask.attended = True
        self._whole = [b for b in self.bound if not b.mask.compressed]  # which have dropped weights to keep at 0
        self._moved = [] if opt.keeps_zeros(self.optimizer) else list(self._whole)  # which steps may move off 0
        self._look_anew()
        self._mask_written()  # code that initialized weights after sparsify() did not know of masks

    def remove(self) -> None:
        """Let go of the optimizer."""
        self._set_dense_gradients(False)
        for b in self.bound:
            b.mask.attended = False
        for handle in self._handles:
            handle.remove()

    def renew(self) -> None:
        """Go on with what was loaded: by its step, and looking at weights and state as if just attached."""
        self._look_anew()
        self._derive_dense_gradients()

    def _look_anew(self) -> None:
        self._fresh, self._looked = True, False  # no step was taken since a load, and no gradients were looked at
        self._traces: list[tuple[int, int]] = []  # of the weights after the last step

    def _mask_written(self) -> None:
        """Mask the weights that something wrote to since the last step. Writes through `weight.data` leave no trace."""
        traces = [trace_of(b.weight) for b in self._whole]
        before = self._traces or [None] * len(traces)
        _mask([b for b, trace, last in zip(self._whole, traces, before, strict=True) if trace != last])

    def _look(self, step: int) -> None:
        """Find weights with gradients where they are dropped, as penalties, hooks and compression give them.

        Masking all weights after every step instead would cost a tenth of a small network's step on a CPU.
        """
        updated, waits = self._updates_at(self.step), any(b.weight.device.type != "cpu" for b in self.bound)
        if self._looked and (waits or not (updated or step % _EVERY == 0)):
            return
        unmoved = [b for b in self._whole if b not in self._moved and b.mask.density < 1]
        seen = [(b, g) for b in unmoved if (g := opt.dense_gradient(self.optimizer, b.weight)) is not None and not g.is_meta]
        if not seen:
            return
        if self._looked and self.updater.trains_with_others():
            ranks.check_drift(seen)
        strays = torch.stack([has_stray(gradient, b.mask.mask).to(seen[0][1].device) for b, gradient in seen])
        self._moved += [b for (b, _), stray in zip(seen, strays.tolist(), strict=True) if stray]  # waits once
        self._looked = True
        _mask([b for b, _ in seen])

    @torch.no_grad()
    def _mask_state(self) -> None:
        """Mask what the optimizer keeps. No earlier than a step: state may be loaded before the masks it belongs to."""
        gather_state(self.optimizer, self.bound)
        for b in self._whole if not opt.stands_still(self.optimizer) else ():
            for _, tensor in opt.state_tensors(self.optimizer, b.weight):
                zero_dropped_(tensor, b.mask.mask)

    def _derive_dense_gradients(self) -> None:
        """Derive from the step whether the next gradients have to be dense."""
        self._set_dense_gradients(self._dense_at(self.step + 1))

    def _set_dense_gradients(self, dense: bool) -> None:
        summary = largest if self.updater.method.looks_at_largest() and not self.updater.trains_with_others() else None
        for b in self.bound:
            b.mask.dense_gradient = dense
            if b.mask.compressed:
                keep(b.mask.mask, summary)
            if not dense:
                forget(b.mask.mask)

    def _updates_at(self, step: int) -> bool:
        updates = self.updater.method.updates
        return updates is not None and step in updates.steps(self.updater.total_steps)

    def _dense_at(self, step: int) -> bool:
        updates = self.updater.method.updates
        return updates is not None and updates.dense_at(step, self.updater.total_steps)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._counts = not opt.is_idle(optimizer, args, kwargs)
        if not self._counts:
            return None
        if self.groups != opt.group_sizes(optimizer):  # add_param_group
            self._bind()
            self._derive_dense_gradients()
        if self._fresh:
            check_bound(self.model, self.bound)
            self.updater.compare_once()
            self._mask_state()
        self._mask_written()
        return opt.before_step(optimizer, args, kwargs, self._act)

    @torch.no_grad()
    def _act(self) -> None:
        """Do what a step does instead of the optimizer's, or before it; the gradients are there."""
        updates, step = self.updater.method.updates, self.step + 1
        if not self._dense_at(step):
            self._look(step)
        if updates is None or step > updates.last(self.updater.total_steps):
            return
        if updates.momentum is not None or updates.dense_gradients == "always":
            for b in self.bound:
                observe(updates, b, self.updater.momentum(b.name), self.optimizer)
        if updates.replaces_step() and self._updates_at(step):
            self._counts = self._update(step)  # if the update must be tried again, this step does not count
            opt.skip_step(self.optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        opt.end_skip(optimizer)
        if not self._counts:
            return
        self.step += 1
        step, updates = self.step, self.updater.method.updates
        changes = self._updates_at(step)
        replaced = changes and updates is not None and updates.replaces_step()
        if not replaced:
            _mask(self._moved)
            if changes:
                self._update(step)
        self._traces = [trace_of(b.weight) for b in self._whole]
        self._fresh = False
        for b in self.bound:
            if b.mask.compressed:
                end_step(b.mask.mask)
        if changes:
            opt.forget_history(optimizer)
        if self._dense_at(step + 1) != self._dense_at(step):
            self._derive_dense_gradients()

    def _update(self, step: int) -> bool:
        """Change the topology, after an ordinary step or instead of it; False if that has to be tried again."""
        method = self.updater.method
        assert method.updates is not None
        check_bound(self.model, self.bound)
        frozen = set() if method.prunes else opt.stands(self.optimizer)  # pruning has one chance, also while rates warm up
        moving = [b for b in self.bound if b.weight.requires_grad and b.weight not in frozen]
        layers = [(b, state) for b in moving if (state := self._state(b, step))]
        amount = method.updates.amount(step, self.updater.total_steps)
        done = update_layers(method, layers, amount, self.optimizer, self.updater.skipped)
        if done:
            self.updater.record(step)
        return done

    def _state(self, b: Bound, step: int) -> LayerState | None:
        """Return what the update sees of a weight; None if there is nothing to change or to go by."""
        method, goal, mask = self.updater.method, self.updater.goals[b.name], b.mask
        assert method.updates is not None
        if goal.target == mask.mask.numel() and not method.prunes:  # which may prune by one threshold for all layers
            return None
        gradient: Any = None
        weight: Any = WholeWeight(b) if mask.compressed else b.weight
        if method.updates.replaces_step():
            gradient = opt.dense_gradient(self.optimizer, b.weight)
            if gradient is None and method.prunes:
                raise RuntimeError(
                    f"{b.name} has no gradient, and method {method.name!r} prunes by it in this step. Call backward() on the "
                    f"loss of a batch before optimizer.step(), or freeze the weight (requires_grad_(False))."
                )
            if gradient is None:
                return None
        if mask.compressed and gradient is not None:
            gradient = WholeGradient(b, gradient, self.updater.mean_of_ranks)
        return LayerState(
            b.name,
            weight,
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


@torch.no_grad()
def _mask(bound: list[Bound]) -> None:
    for b in bound:
        zero_dropped_(b.weight, b.mask.mask)


def _not_compiled(hook: Callable[..., Any]) -> Any:
    return torch.compiler.disable(hook)
