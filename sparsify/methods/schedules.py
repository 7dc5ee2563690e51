"""Schedules: how a quantity changes over training, as pure functions of the step."""

import math
from collections.abc import Callable


def cosine(initial: float, step: int, end_step: float) -> float:
    """Anneal from `initial` at step 0 to 0 at `end_step` along half a cosine: f_decay of the RigL paper, section 3(2).

    Args:
        initial: alpha, the value at step 0.
        step: optimizer steps, counted from 1.
        end_step: where it reaches 0.

    Returns:
        initial / 2 * (1 + cos(pi * step / end_step)).

    Example:
        >>> cosine(0.3, 0, 100), round(cosine(0.3, 50, 100), 3), cosine(0.3, 100, 100)
        (0.3, 0.15, 0.0)
    """
    return initial / 2 * (1 + math.cos(math.pi * step / end_step))


def constant(initial: float, step: int, end_step: float) -> float:
    """Stay at `initial` (RigL paper, appendix on update schedules).

    Example:
        >>> constant(0.3, 99, 100)
        0.3
    """
    return initial


def linear(initial: float, step: int, end_step: float) -> float:
    """Fall in a straight line: initial * (1 - step / end_step), the inverse power of 1.

    Example:
        >>> linear(0.3, 0, 100), linear(0.3, 50, 100)
        (0.3, 0.15)
    """
    return inverse_power(initial, step, end_step, power=1)


def inverse_power(initial: float, step: int, end_step: float, power: int = 3) -> float:
    """Fall as initial * (1 - step / end_step)**power (RigL paper, appendix on update schedules; Zhu & Gupta use power 3).

    Example:
        >>> inverse_power(0.8, 0, 100), inverse_power(0.8, 50, 100)
        (0.8, 0.1)
    """
    return initial * (1 - step / end_step) ** power


DropSchedule = Callable[[float, int, float], float]
DROP_SCHEDULES: dict[str, DropSchedule] = {f.__name__: f for f in (cosine, constant, linear, inverse_power)}


def cubic(step: int, begin_step: int, end_step: int) -> float:
    """Return the share of the final sparsity that gradual pruning has reached (Zhu & Gupta, arXiv 1710.01878, equation 1).

    Args:
        step: optimizer steps, counted from 1.
        begin_step: t0, up to which nothing is pruned.
        end_step: t1, from which on everything is; at least `begin_step`.

    Returns:
        1 - (1 - (step - t0) / (t1 - t0))**3, from 0 to 1.

    Example:
        >>> cubic(0, 0, 100), cubic(50, 0, 100), cubic(200, 0, 100)
        (0.0, 0.875, 1.0)
    """
    if step >= end_step:
        return 1.0
    return 1 - (1 - max(0, step - begin_step) / (end_step - begin_step)) ** 3
