"""Methods: the published ones, each a record composed of schedules, plans, scores and a layout."""

from dataclasses import replace
from functools import partial
from typing import Any

from sparsify.checks import resolve
from sparsify.methods import costs, scores
from sparsify.methods.how_many import redistribute
from sparsify.methods.initial_values import GROWTH_INITS
from sparsify.methods.layouts import ELEMENTS, KERNELS
from sparsify.methods.method import Method, steady_updates
from sparsify.methods.pruning import GMP, SNIP
from sparsify.methods.row_layouts import shared
from sparsify.methods.structured import NM, SRigL

_SHARES = {"gradient": scores.gradient, "momentum": scores.momentum}
_LAYOUTS = {"elements": ELEMENTS, "kernels": KERNELS, "2x1": shared(2), "4x1": shared(4)}
_NAMES = {KERNELS.name: "rigl-struct", "2x1": "rigl-2x1", "4x1": "rigl-4x1"}  # of RigL on layouts
_MOMENTUM = 0.9  # decay of the moving average of gradients in SNFS


def Static() -> Method:  # noqa: N802
    """Static sparse training: the masks drawn or given at the start never change.

    Returns:
        The method's record.

    Example:
        >>> Static().updates is None
        True
    """
    return Method("static", costs.sparse)


def RigL(  # noqa: N802
    interval: int = 100,
    drop_fraction: float = 0.3,
    end_fraction: float = 0.75,
    *,
    drop_schedule: str = "cosine",
    growth_init: str = "zeros",
    redistribution: str | None = None,
    layout: str = "elements",
) -> Method:
    """Rigging the lottery (Evci et al., arXiv 1911.11134, Algorithm 1): drop small weights, grow by dense gradient.

    Args:
        interval: optimizer steps between updates (Delta T), at least 1.
        drop_fraction: alpha, the share of active weights dropped at the start, in (0, 1).
        end_fraction: share of training after which the topology stays as it is (T_end / T), in (0, 1].
        drop_schedule: how the drop fraction changes: "cosine", "constant", "linear" or "inverse_power".
        growth_init: of newly grown weights: "zeros", "random" (of the size of the active ones) or "gradient" (a small step
            against it); RigL paper, appendix on the initialization of new connections.
        redistribution: None keeps every layer's count; "gradient" (RigL-SG) and "momentum" (RigL-SM) grow where the mean
            |gradient| or |moving average of the gradient| of the active weights is high (arXiv 2103.15767).
        layout: "elements"; "kernels" to drop and grow whole kernels of a convolution; "2x1" or "4x1" to let as many
            consecutive outputs share their pattern, which the kernels of `lower` run faster.

    Returns:
        The method's record.

    Raises:
        ValueError: an argument is out of range or unknown.

    Example:
        >>> RigL(interval=50).updates.steps(400)
        range(50, 300, 50)
    """
    kind = resolve(layout, _LAYOUTS, "layout")
    updates = steady_updates(interval, drop_fraction, end_fraction, drop_schedule)
    updates = replace(updates, growth_init=resolve(growth_init, GROWTH_INITS, "growth_init"), **_shares(redistribution))
    if redistribution and kind is not ELEMENTS:
        raise ValueError(f"redistribution needs layout='elements': layers exchange single weights, not {kind.name}.")
    name = {None: "rigl", "gradient": "rigl-sg", "momentum": "rigl-sm"}[redistribution]
    return Method(_NAMES.get(kind.name, name), partial(costs.rigl, interval), updates, kind)


def SET(  # noqa: N802
    interval: int = 100, drop_fraction: float = 0.3, end_fraction: float = 0.75, *, drop_schedule: str = "cosine"
) -> Method:
    """Sparse evolutionary training (Mocanu et al., arXiv 1707.04780): drop small weights, grow at random.

    Args:
        interval: optimizer steps between updates, at least 1.
        drop_fraction: zeta, the share of active weights dropped at the start, in (0, 1).
        end_fraction: share of training after which the topology stays as it is, in (0, 1].
        drop_schedule: "cosine" (as the RigL paper runs it), "constant" (as published), "linear" or "inverse_power".

    Returns:
        The method's record.

    Raises:
        ValueError: an argument is out of range or unknown.

    Example:
        >>> SET().updates.dense_gradients
        'never'
    """
    updates = steady_updates(interval, drop_fraction, end_fraction, drop_schedule)
    return Method("set", costs.sparse, replace(updates, growth_score=scores.chance, dense_gradients="never"))


def SNFS(  # noqa: N802
    interval: int = 100, drop_fraction: float = 0.3, end_fraction: float = 0.75, *, drop_schedule: str = "cosine"
) -> Method:
    """Sparse networks from scratch (Dettmers & Zettlemoyer, arXiv 1907.04840): grow and redistribute by sparse momentum.

    A moving average of the dense gradient (decay 0.9) decides which weights grow, and its mean over a layer's active weights
    how many. It needs the dense gradient in every step until updates end.

    Args:
        interval: optimizer steps between updates, at least 1.
        drop_fraction: the share of active weights dropped at the start, in (0, 1).
        end_fraction: share of training after which the topology stays as it is, in (0, 1].
        drop_schedule: "cosine", "constant", "linear" or "inverse_power".

    Returns:
        The method's record.

    Raises:
        ValueError: an argument is out of range or unknown.

    Example:
        >>> SNFS().training_ratio(0.25)
        0.5
    """
    updates = steady_updates(interval, drop_fraction, end_fraction, drop_schedule)
    updates = replace(updates, growth_score=scores.momentum, dense_gradients="always", **_shares("momentum"))
    return Method("snfs", costs.snfs, updates)


def _shares(redistribution: str | None) -> dict[str, Any]:
    """What redistribution changes in a record of updates."""
    if redistribution is None:
        return {}
    score = resolve(redistribution, _SHARES, "redistribution")
    plan = partial(redistribute, score)
    return {"plan": plan, "counts_vary": True, "momentum": _MOMENTUM if score is scores.momentum else None}


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Static(),
        SET(),
        SNFS(),
        RigL(),
        RigL(redistribution="gradient"),
        RigL(redistribution="momentum"),
        RigL(layout="kernels"),
        RigL(layout="2x1"),
        RigL(layout="4x1"),
        SRigL(),
        NM(),
        GMP(),
        GMP(scope="global"),
        SNIP(scope="layer"),
        SNIP(),
    )
}
