"""Costs: what training costs relative to dense training, by the published closed forms and by the sum over a schedule.

One step costs 3 inferences by the papers' convention: forward, gradient of the inputs, gradient of the weights. All three
follow the masks, except the weights' gradient in a step that computes it densely, which costs a dense inference. A closed
form (RigL paper, appendix H) is a function of f_S, the inference FLOPs of the sparse network relative to the dense one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sparsify.methods.method import Method, Updates

# The published closed forms.


def sparse(inference_ratio: float) -> float:
    """Static, SET, SNIP: forward, input gradient and weight gradient are all sparse, 3 f_S.

    Example:
        >>> sparse(0.25)
        0.25
    """
    return inference_ratio


def rigl(interval: int, inference_ratio: float) -> float:
    """RigL: one dense weight gradient per interval, (3 f_S dT + 2 f_S + f_D) / (dT + 1).

    Example:
        >>> round(rigl(100, 0.4138), 4)
        0.4157
    """
    return (3 * inference_ratio * interval + 2 * inference_ratio + 1) / (interval + 1) / 3


def snfs(inference_ratio: float) -> float:
    """SNFS: a dense weight gradient in every step, 2 f_S + f_D.

    Example:
        >>> snfs(0.25)
        0.5
    """
    return (2 * inference_ratio + 1) / 3


def gmp(begin_fraction: float, end_fraction: float, inference_ratio: float) -> float:
    """Gradual pruning: the mean of 3 f_S(t); the cubic's mean is 3/4 while it rises, and 1 afterwards.

    Example:
        >>> round(gmp(700 / 87891, 0.75, 0.27), 2)  # WRN-22-2 in arXiv 2103.15767
        0.41
    """
    mean = (end_fraction - begin_fraction) * 3 / 4 + 1 - end_fraction
    return 1 - (1 - inference_ratio) * mean


# The sum over a schedule.

NOMINAL_STEPS = 100_000  # of a forecast for a model that is not attached to an optimizer


@dataclass(frozen=True)
class Spending:
    """Training MACs per sample, in dense inferences: a dense step is 3."""

    steps: int
    forward: float
    input_gradient: float
    weight_gradient: float  # where it follows the masks
    dense_gradient: float  # what dense weight gradients cost on top of that

    @property
    def ratio(self) -> float:
        """The whole relative to as many dense steps; 1 before the first."""
        spent = self.forward + self.input_gradient + self.weight_gradient + self.dense_gradient
        return spent / (3 * self.steps) if self.steps else 1.0


def spend(ratios: Sequence[tuple[int, float]], updates: Updates | None, steps: int, total_steps: int) -> list[Spending]:
    """Add up the cost of training.

    Args:
        ratios: (step, inference FLOPs relative to dense from the end of that step on), ascending, the first at step 0.
        updates: of the method.
        steps: how many were taken.
        total_steps: how many the schedule is laid out over.

    Returns:
        The sums at the end of every stretch of `ratios`, the last over all `steps`.

    Example:
        >>> [x.ratio for x in spend([(0, 1.0), (5, 0.2)], None, 10, 10)]  # half dense, half at a fifth
        [1.0, 0.6]
    """
    sums, sparse, dense = [], 0.0, 0.0
    ends = [step for step, _ in ratios[1:]] + [steps]
    for (start, ratio), end in zip(ratios, ends, strict=True):
        end = min(end, steps)
        sparse += ratio * max(0, end - start)
        dense += (1 - ratio) * (_dense_steps(updates, end, total_steps) - _dense_steps(updates, start, total_steps))
        sums.append(Spending(end, sparse, sparse, sparse, dense))
    return sums


def _dense_steps(updates: Updates | None, step: int, total_steps: int) -> int:
    """Count the steps up to `step` that computed dense weight gradients."""
    if updates is None or updates.dense_gradients == "never" or not (when := updates.steps(total_steps)):
        return 0
    if updates.dense_gradients == "always":
        return min(step, when[-1])
    return len(range(when.start, min(step + 1, when.stop), when.step))


def forecast(method: Method, ratio: float, total_steps: int) -> float:
    """Return the training FLOPs of a run of this library relative to dense training.

    Args:
        method: whose schedule is summed up.
        ratio: inference FLOPs relative to dense once the method's density is reached.
        total_steps: of the run.

    Returns:
        The exact sum for a method that keeps its density, where an update that replaces a step costs what the step would
        have. For one that prunes, every layer's density is taken to fall in step with the others.

    Example:
        >>> from sparsify import RigL
        >>> round(forecast(RigL(interval=100), 0.4138, 100_000), 4)
        0.4153
    """
    ratios, updates = [(0, ratio)], method.updates
    if method.prunes and updates:
        ratios = [(0, 1.0)] + [(t, 1 - (1 - ratio) * updates.amount(t, total_steps)) for t in updates.steps(total_steps)]
    return spend(ratios, updates, total_steps, total_steps)[-1].ratio
