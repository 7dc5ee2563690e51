"""Schedules: how a quantity changes over training, as pure functions of the step."""

import math


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
