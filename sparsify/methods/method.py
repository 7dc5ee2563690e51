"""Method: what a sparse training method is, a frozen record of functions."""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from sparsify.checks import check_between, check_whole, resolve
from sparsify.methods import schedules, scores
from sparsify.methods.how_many import Plan, steady
from sparsify.methods.initial_values import GROWTH_INITS
from sparsify.methods.layouts import ELEMENTS, Layout
from sparsify.methods.scores import LayerState, Score


@dataclass(frozen=True)
class Updates:
    """When a topology changes, by how much, and what decides.

    `dense_gradients` says in which steps the backward pass computes gradients of dropped weights too:

    - "updates": in those that update, whose optimizer step the update then replaces;
    - "always": in every step up to the last update; the optimizer sees them masked, and updates follow its step;
    - "never": updates follow the step.
    """

    steps: Callable[[int], range]  # total_steps -> the optimizer steps that update, counted from 1
    amount: Callable[[int, int], float]  # (step, total_steps) -> what the plan is told
    plan: Plan = steady
    drop_score: Score = scores.weight  # the lowest active weights are dropped
    growth_score: Score = scores.gradient  # the highest candidates are grown
    growth_init: Callable[[LayerState], Tensor] | None = None  # values of newly grown weights; None: zeros
    dense_gradients: str = "updates"
    momentum: float | None = None  # decay of a moving average of the gradient, where a score wants one
    counts_vary: bool = False  # whether the plan may drop and grow different numbers in a layer

    def __post_init__(self) -> None:
        known = ("updates", "always", "never")
        if self.dense_gradients not in known:
            raise ValueError(f"Unknown dense_gradients {self.dense_gradients!r}; choose one of {', '.join(known)}.")

    def replaces_step(self) -> bool:
        """Whether an update is taken instead of the optimizer's step."""
        return self.dense_gradients == "updates"

    def last(self, total_steps: int) -> int:
        """Return the step of the last update; 0 where a run is too short for any."""
        return (self.steps(total_steps) or (0,))[-1]

    def dense_at(self, step: int, total_steps: int) -> bool:
        """Whether this step computes gradients of dropped weights too."""
        return (
            step in self.steps(total_steps)
            if self.replaces_step()
            else self.dense_gradients == "always" and 0 < step <= self.last(total_steps)
        )


@dataclass(frozen=True)
class Goal:
    """What a masked weight is meant to keep, and how it may."""

    target: int  # weights, from 1 to its size; a weight that keeps all is never changed
    unit: int = 1  # weights that are dropped or grown together
    out_dim: int | None = None  # the dimension that indexes outputs, where it is known


@dataclass(frozen=True)
class Method:
    """A sparse training method.

    `training_ratio` is the published closed form: it maps f_S, the inference FLOPs relative to dense, to the training FLOPs
    relative to dense. What a run of this library costs is worked out from `updates` (`sparsify.costs.ledger`).

    Example:
        Your own method is another record; this one is RigL that drops by |w * dL/dw|:

        >>> from dataclasses import replace
        >>> from sparsify import RigL, scores
        >>> rigl = RigL(interval=50)
        >>> mine = replace(rigl, name="mine", updates=replace(rigl.updates, drop_score=scores.saliency))
        >>> mine.updates.drop_score.__name__
        'saliency'
    """

    name: str
    training_ratio: Callable[[float], float]
    updates: Updates | None = None  # None: the topology never changes
    layout: Layout = ELEMENTS
    prunes: bool = False  # starts dense; `updates.amount` is the share of the final sparsity that is reached
    total_only: bool = False  # whether layers share one budget, so that the distribution decides the total only

    def schedule(self, total_steps: int) -> tuple[float, ...]:
        """Return numbers that two records share if they update at the same steps by the same amounts."""
        steps = self.updates.steps(total_steps) if self.updates and total_steps else range(0)
        amounts = [round(self.updates.amount(t, total_steps), 9) for t in (*steps[:1], *steps[-1:]) if self.updates]
        return (steps.start, steps.stop, steps.step, *amounts)

    def schedule_digest(self, total_steps: int) -> int:
        """Return one number for `schedule`."""
        return zlib.crc32(repr(self.schedule(total_steps)).encode())

    def updates_after(self, step: int, total_steps: int) -> int:
        """Count the updates that are to come after a step; none where the steps of the run are not known."""
        return sum(t > step for t in self.updates.steps(total_steps)) if self.updates and total_steps else 0

    def looks_at_largest(self) -> bool:
        """Whether of the gradients of a layer's dropped weights only the largest matter, as many as it keeps."""
        updates = self.updates
        if updates is None or not updates.replaces_step() or updates.momentum is not None or self.layout is not ELEMENTS:
            return False
        scored = updates.drop_score is scores.weight and updates.growth_score is scores.gradient
        return scored and updates.plan is steady and updates.growth_init in GROWTH_INITS.values()

    def counts_vary(self) -> bool:
        """Whether an update may change how many weights a layer keeps."""
        return self.updates is not None and (self.updates.counts_vary or not self.layout.exact)


def steady_updates(interval: int, drop_fraction: float, end_fraction: float, drop_schedule: str) -> Updates:
    """RigL's updates: t % interval == 0 and t < end_step, at a drop fraction that follows a schedule until end_step."""
    check_whole("interval", interval)
    check_between("drop_fraction", drop_fraction, open_above=True)
    check_between("end_fraction", end_fraction)
    # Partials of the module's functions, so that a model can be pickled with its updater.
    schedule = resolve(drop_schedule, schedules.DROP_SCHEDULES, "drop_schedule", callable)
    return Updates(partial(_every, interval, end_fraction), partial(_scheduled, schedule, drop_fraction, end_fraction))


def _every(interval: int, end_fraction: float, total_steps: int) -> range:
    return range(interval, math.ceil(end_fraction * total_steps - 1e-6), interval)  # safe from float error


def _scheduled(
    schedule: schedules.DropSchedule, drop_fraction: float, end_fraction: float, step: int, total_steps: int
) -> float:
    return schedule(drop_fraction, step, end_fraction * total_steps)
