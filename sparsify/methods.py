"""Methods: what a sparse training method is, a frozen record of functions."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from sparsify import schedules


@dataclass(frozen=True)
class Updates:
    """When a topology changes, by how much, and what decides.

    A step t (counted from 1) updates the topology where t % interval == 0 and t < end_fraction * total_steps.
    """

    interval: int
    end_fraction: float
    drop_fraction: Callable[[int, float], float]  # (step, end_step): share of the active weights that is dropped
    keep_score: Callable[[Tensor], Tensor]  # weight: the lowest are dropped
    growth_score: Callable[[Tensor], Tensor]  # dense gradient: the highest are grown

    def at(self, step: int, end_step: float) -> bool:
        """Tell whether the topology changes in this step."""
        return step % self.interval == 0 and step < end_step


@dataclass(frozen=True)
class Method:
    """A sparse training method.

    Both ratios map f_S, the inference FLOPs relative to dense, to the training FLOPs relative to dense: `training_ratio`
    by the published closed form of the method, `exact_training_ratio` by the ledger of a run of this library, where an
    update replaces an optimizer step and updates end at end_step.
    """

    name: str
    training_ratio: Callable[[float], float]
    exact_training_ratio: Callable[[float], float]
    updates: Updates | None = None  # None: the topology never changes


def magnitude(tensor: Tensor) -> Tensor:
    """Score by absolute value."""
    return tensor.abs()


def _rigl_ratio(interval: int, inference_ratio: float) -> float:
    # (3 f_S dT + 2 f_S + f_D) / (dT + 1) relative to 3 f_D: RigL paper, appendix H
    return (3 * inference_ratio * interval + 2 * inference_ratio + 1) / (interval + 1) / 3


def _rigl_ledger(interval: int, end_fraction: float, inference_ratio: float) -> float:
    # ((dT - 1) 3 f_S + 2 f_S + f_D) / dT while updates run, 3 f_S afterwards, relative to 3 f_D
    updating = ((interval - 1) * 3 * inference_ratio + 2 * inference_ratio + 1) / interval / 3
    return end_fraction * updating + (1 - end_fraction) * inference_ratio


def _sparse_ratio(inference_ratio: float) -> float:
    return inference_ratio  # 3 f_S relative to 3 f_D


def RigL(interval: int = 100, drop_fraction: float = 0.3, end_fraction: float = 0.75) -> Method:  # noqa: N802
    """Rigging the lottery (Evci et al., arXiv 1911.11134, Algorithm 1): drop small weights, grow by dense gradient.

    Args:
        interval: optimizer steps between updates (Delta T), at least 1.
        drop_fraction: alpha, the share of active weights dropped at the start, in (0, 1); a cosine takes it to 0.
        end_fraction: share of training after which the topology stays as it is (T_end / T), in (0, 1].

    Returns:
        The method's record.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> RigL(interval=50).updates.at(step=100, end_step=750.0)
        True
    """
    _check_whole("interval", interval)
    _check_between("drop_fraction", drop_fraction, open_above=True)
    _check_between("end_fraction", end_fraction)
    return Method(
        "rigl",
        partial(_rigl_ratio, interval),
        partial(_rigl_ledger, interval, end_fraction),
        Updates(interval, end_fraction, partial(schedules.cosine, drop_fraction), magnitude, magnitude),
    )


def Static() -> Method:  # noqa: N802
    """Static sparse training: the masks drawn at the start never change.

    Returns:
        The method's record.

    Example:
        >>> Static().updates is None
        True
    """
    return Method("static", _sparse_ratio, _sparse_ratio)


def _check_whole(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")


def _check_between(name: str, value: Any, open_above: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value <= 1 or (open_above and value == 1):
        raise ValueError(f"{name}={value!r} must lie in (0, 1{')' if open_above else ']'}.")


METHODS: dict[str, Method] = {"rigl": RigL(), "static": Static()}
