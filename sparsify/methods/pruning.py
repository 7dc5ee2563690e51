"""Pruning methods: start dense, and become sparse while training."""

import math
from functools import partial

from sparsify.checks import check_between, check_whole, resolve
from sparsify.methods import costs, schedules, scores
from sparsify.methods.how_many import Plan, prune, prune_global
from sparsify.methods.method import Method, Updates


def GMP(  # noqa: N802
    interval: int = 100, begin_fraction: float = 0.0, end_fraction: float = 0.75, *, scope: str = "layer"
) -> Method:
    """Gradual magnitude pruning (Zhu & Gupta, arXiv 1710.01878): start dense, prune along a cubic schedule.

    Args:
        interval: optimizer steps between prunings, at least 1.
        begin_fraction: share of training before which nothing is pruned (t0 / T), in [0, 1).
        end_fraction: share of training after which nothing is (t1 / T), above `begin_fraction`, up to 1.
        scope: "layer" prunes every layer to its own density; "global" removes the smallest weights of all layers, and the
            distribution decides the total only.

    Returns:
        The method's record.

    Raises:
        ValueError: an argument is out of range or unknown, or the end is not after the beginning.

    Example:
        >>> method = GMP(interval=100, begin_fraction=0.25, end_fraction=0.75)
        >>> method.updates.steps(1000), round(method.training_ratio(0.2), 3)
        (range(350, 751, 100), 0.5)
    """
    check_whole("interval", interval)
    check_between("begin_fraction", begin_fraction, closed_below=True)
    check_between("end_fraction", end_fraction)
    if begin_fraction >= end_fraction:
        raise ValueError(
            f"begin_fraction={begin_fraction!r} must be below end_fraction={end_fraction!r}: pruning ends after it begins."
        )

    plan = _plan(scope, scores.weight)
    name = "gmp" if scope == "layer" else "gmp-global"
    span = (interval, begin_fraction, end_fraction)
    steps, amount = partial(_pruning_steps, *span), partial(_cubic, *span)
    updates = Updates(steps, amount, plan, dense_gradients="never", counts_vary=True)
    published = partial(costs.gmp, begin_fraction, end_fraction)
    return Method(name, published, updates, prunes=True, total_only=scope == "global")


def SNIP(*, scope: str = "global") -> Method:  # noqa: N802
    """Single-shot network pruning (Lee et al., arXiv 1810.02340): the first batch decides, by |w * dL/dw|.

    The first optimizer step is replaced by the pruning of the dense network.

    Args:
        scope: "global" as published: the distribution decides the total only; "layer" prunes every layer to its own density.

    Returns:
        The method's record.

    Raises:
        ValueError: the scope is unknown.

    Example:
        >>> SNIP().updates.steps(1000)
        range(1, 2)
    """
    plan = _plan(scope, scores.saliency)
    updates = Updates(_first_step, _all_at_once, plan, drop_score=scores.saliency, counts_vary=True)
    name = "snip" if scope == "global" else "snip-layer"
    return Method(name, costs.sparse, updates, prunes=True, total_only=scope == "global")


def _plan(scope: str, score: scores.Score) -> Plan:
    return resolve(scope, {"layer": prune, "global": partial(prune_global, score)}, "scope")


def _pruning_steps(interval: int, begin_fraction: float, end_fraction: float, total_steps: int) -> range:
    begin, end = (math.floor(part * total_steps + 1e-6) for part in (begin_fraction, end_fraction))  # safe from float error
    return range(begin + interval, end + 1, interval)


def _cubic(interval: int, begin_fraction: float, end_fraction: float, step: int, total_steps: int) -> float:
    steps = _pruning_steps(interval, begin_fraction, end_fraction, total_steps)
    return schedules.cubic(step, steps[0] - interval, steps[-1])


def _first_step(total_steps: int) -> range:
    return range(1, 2)


def _all_at_once(step: int, total_steps: int) -> float:
    return 1.0
