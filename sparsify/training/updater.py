"""The updater: the module that changes a model's masks while an optimizer trains it.

A thin shell: it holds the schedule's position and calls the pure functions of the method. It lives on the model as
`model.updater`, so that one `state_dict` holds masks, step and schedule.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from passes.masking.mask import masks_of
from passes.weights.reasons import Reason
from sparsify.methods.method import Goal, Method
from sparsify.training import ranks
from sparsify.training.base import UpdaterBase, momentum_buffer
from sparsify.training.conditions import check_attach, check_compressed
from sparsify.training.hooks import OptimizerHooks
from sparsify.training.loading import changed_schedule, check_before_load, settle_after_load, settle_unattended
from sparsify.training.state import History, State

_SHARED = (
    "The masks are in shared memory. One process may train the model and others may use it, but processes that all train it "
    "(Hogwild) would each change the masks: let each have a model of its own, and DistributedDataParallel keep them equal."
)


class Updater(UpdaterBase):
    """Changes the masks of one model by one method; made by `sparsify`, found at `model.updater`.

    Args:
        model: the masked model that owns this module.
        method: what to drop and grow, and when.
        goals: {parameter name: goal} of every masked weight.
        reasons: {parameter name: why it is dense} of every other weight that the model consumes.
        seed: of what the method draws at random.
    """

    def __init__(
        self, model: nn.Module, method: Method, goals: Mapping[str, Goal], reasons: Mapping[str, Reason], seed: int = 0
    ) -> None:
        super().__init__()
        self.method = method
        self.goals = dict(goals)
        self.reasons = dict(reasons)
        self.seed = seed
        self._model = (model,)
        self._attached: list[OptimizerHooks] = []
        self._steps = [0]
        self._total_steps = 0
        self._history = History(goals)
        self._process_group: Any = None
        self._compared = False
        if method.updates and method.updates.momentum is not None:
            for name in self.goals:
                self.register_buffer(momentum_buffer(name), torch.zeros_like(model.get_parameter(name)))
        for name, mask in masks_of(model).items():
            mask.belongs_to(model.get_parameter(name))
        # Updates that a non-finite gradient prevented: counted on the device, read when the host asks.
        device = next(iter(self.masks.values())).device
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64, device=device), persistent=False)
        self._skipped_before = self._skipped_said = 0
        self._load_hooks = (
            model.register_load_state_dict_pre_hook(check_before_load),
            model.register_load_state_dict_post_hook(settle_after_load),
        )

    # What a training loop calls.

    def attach(self, *optimizers: Optimizer, total_steps: int, process_group: Any = None) -> None:
        """Let the optimizers' steps drive the topology: the one line a training loop gains.

        After a `load_state_dict` training goes on at the saved step; otherwise steps are counted from 1.

        Args:
            *optimizers: every optimizer that trains masked weights, made from this model's parameters.
            total_steps: optimizer steps of the whole run, from 1; the method's schedule is laid out over them.
            process_group: the ranks that train this model together, where torch.distributed is initialized; by default all.
                The first step compares their masks.

        Raises:
            RuntimeError: already attached.
            ValueError: `total_steps` is not a whole number or too low for any update, or the optimizers together lack a
                masked weight that requires grad. Nothing was changed.

        Example:
            >>> from sparsify import sparsify
            >>> model = sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), density=0.5)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> model.updater.attach(optimizer, total_steps=1000)
        """
        if self._attached:
            raise RuntimeError("The updater is attached already; call updater.detach() before attaching again.")
        check_attach(self.method, self.goals, self._model[0], optimizers, total_steps)
        check_compressed(self.method, self._model[0], optimizers, alone=not self._trains_with(process_group))
        if self._total_steps not in (0, total_steps):
            warnings.warn(changed_schedule(self.method, self.step, self._total_steps, total_steps), stacklevel=2)
        if self.skipped.is_meta:  # of a model whose tensors came from a load
            self.skipped = torch.zeros_like(self.skipped, device=next(iter(self.masks.values())).device)
        steps = self._clocks()
        self._total_steps, self._process_group = int(total_steps), process_group
        for optimizer, step in zip(optimizers, _clocks_for(optimizers, steps), strict=True):
            self._attached.append(OptimizerHooks(self, self._model[0], optimizer, step))
        if self.step == 0:
            self._history = History(self.goals)
            self.record(0)
        self.renew()
        if any(mask.is_cpu and mask.is_shared() for mask in self.masks.values()):
            warnings.warn(_SHARED, stacklevel=2)
        for name in self.replaced:
            warnings.warn(
                f"{name} was masked, but its layer has been replaced since sparsify(): it trains dense now.", stacklevel=2
            )

    def detach(self, *, keep_step: bool = False) -> None:
        """Let go of the optimizers; masks stay as they are.

        Args:
            keep_step: whether a later `attach` goes on at this step; otherwise it counts from 1 again.
        """
        self._steps = self._clocks() if keep_step else [0]
        self._total_steps = self._total_steps if keep_step else 0
        for hooks in self._attached:
            hooks.remove()
        self._attached = []

    def compare_ranks(self) -> None:
        """Raise if ranks hold different masks or schedules; every rank has to call it.

        The first step after `attach` or a load does. Later on masks can only drift apart where gradients are not reduced, as in
        a loop that calls the model past its DDP wrapper: call this at the end of an epoch to know.

        Raises:
            RuntimeError: naming the first difference, on every rank.
        """
        if self.trains_with_others():
            ranks.check_same(self, self._model[0], self._process_group)

    def synchronize(self) -> None:
        """Take over weights, masks, step and optimizer state of the rank that has taken most steps; every rank has to call it.

        For ranks with uneven inputs, after `with ddp.join():`, where the last rank goes on alone: DDP makes the parameters
        equal at its end, and neither the optimizers nor the masks.

        Raises:
            RuntimeError: torch.distributed is not initialized.
            ValueError: the model is sharded.
        """
        if not self.trains_with_others():
            raise RuntimeError("synchronize() is for several ranks: torch.distributed is not initialized here, or has one.")
        optimizers = [hooks.optimizer for hooks in self._attached]
        ranks.take_over(self, self._model[0], optimizers, self._process_group)
        self.renew()

    def remove(self) -> None:
        """Detach, and take this module off its model; the masks stay."""
        self.detach()
        ranks.ignore_in_ddp(self._model[0], ignore=False)
        for handle in self._load_hooks:
            handle.remove()
        del self._model[0].updater

    # What hooks call.

    def trains_with_others(self) -> bool:
        """Whether other processes train this model too."""
        return self._trains_with(self._process_group)

    def _trains_with(self, group: Any) -> bool:
        return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1

    def mean_of_ranks(self, tensor: Tensor) -> Tensor:
        """Return the mean over the processes that train this model; each of them has to call it."""
        return ranks.mean(tensor, self._process_group) if self.trains_with_others() else tensor

    def compare_once(self) -> None:
        """Compare ranks once after `attach` or a load, when all of them take a step."""
        if not self._compared:
            self.compare_ranks()
        self._compared = True

    def train(self, mode: bool = True) -> "Updater":
        """Set the mode, and look after a copy that averages may have written to."""
        self.settle()
        return super().train(mode)

    def settle(self) -> None:
        """Look after the masks that no attached optimizer keeps."""
        settle_unattended(self._model[0], {} if self.method.counts_vary() else self.goals)

    # What state_dict, copies and loading need.

    def renew(self) -> None:
        """After a load, derive from the step whether the next gradients have to be dense, and look at everything again."""
        self._compared = False
        for hooks in self._attached:
            hooks.renew()

    def __getstate__(self) -> dict[str, Any]:
        # A copy is not attached: the hooks belong to the optimizers of the original.
        return {**vars(self), "_attached": [], "_steps": self._clocks(), "_process_group": None}

    def get_extra_state(self) -> Tensor:
        """Return schedule, steps, counts and history as one CPU tensor, so that every tool that reads a `state_dict` can."""
        self.settle()
        targets, nonzeros = [goal.target for goal in self.goals.values()], self.nonzeros
        state = State(
            self.method.name,
            self.seed,
            self._total_steps,
            self.method.schedule_digest(self._total_steps),
            self.skipped_updates,
            self._clocks(),
            [nonzeros.get(name, 0) for name in self.goals],
            targets,
            self._history.entries,
        )
        coming = self.method.updates_after(self.step, self._total_steps)
        return state.encode(coming, self.method.counts_vary())

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the step and the schedule of a `state_dict`."""
        saved = State.decode(state)
        if saved.schedule != self.method.schedule_digest(saved.total_steps):
            warnings.warn(
                f"The state_dict comes from a method {saved.method!r} with another interval, drop fraction or end; training "
                f"goes on by this model's.",
                stacklevel=2,
            )
        self.seed, self._steps = saved.seed, saved.clocks
        for hooks, step in zip(self._attached, _clocks_for(self._attached, self._steps), strict=True):
            hooks.step = step
        if not self._attached:
            self._total_steps = saved.total_steps
        elif saved.total_steps not in (0, self._total_steps):  # what `attach` was told counts
            warnings.warn(changed_schedule(self.method, self.step, saved.total_steps, self._total_steps), stacklevel=2)
        self._history = History(self.goals, saved.history)
        self._skipped_before = self._skipped_said = saved.skipped
        self.skipped.zero_()


def _clocks_for(optimizers: Sequence[Any], steps: Sequence[int]) -> list[int]:
    """Return one step for each optimizer; those that no step is known of go by the latest."""
    return [steps[i] if i < len(steps) else max(steps) for i in range(len(optimizers))]
