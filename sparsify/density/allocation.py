"""Allocation: how many weights every layer is to keep, from a density or a FLOP budget."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from passes.weights.reasons import Reason, Why
from passes.weights.sites import Site
from sparsify.checks import is_number, matching
from sparsify.density.distributions import Distribution

Count = Callable[[Site, float], int]  # how many weights of a site a density keeps


def allocate(sites: Sequence[Site], density: Any, distribution: Distribution, count: Count) -> dict[str, int]:
    """Say how many weights each site is to keep.

    Args:
        sites: the weights that may be masked.
        density: a number or {pattern: number}.
        distribution: spreads a number over the sites.
        count: rounds each weight's density to a count.

    Returns:
        {parameter name: count}; a site that is not in it stays dense by rule.

    Raises:
        ValueError: every weight would stay dense, or a density is out of range.
    """
    if isinstance(density, Mapping):
        matching(density, [s.name for s in sites], "density")
        first = {s.name: next((d for p, d in density.items() if fnmatch.fnmatchcase(s.name, p)), None) for s in sites}
        densities = {name: value for name, value in first.items() if value is not None}
    else:
        densities = _spread(distribution, sites, density)
    if not densities:
        raise ValueError(
            "Every weight would stay dense, so there is nothing to mask: give a density pattern or another distribution."
        )
    return {site.name: count(site, densities[site.name]) for site in sites if site.name in densities}


def _spread(distribution: Distribution, sites: Sequence[Site], density: float) -> dict[str, float]:
    """Ask a distribution, which may be anybody's function, and check what it says."""
    densities, names = distribution(sites, density), [site.name for site in sites]
    if not isinstance(densities, Mapping):
        raise ValueError(f"The distribution returned {densities!r}; it must return {{parameter name: density}}.")
    for name, value in densities.items():
        if name not in names:
            raise ValueError(f"The distribution names {name!r}, which is not a weight; weights are {', '.join(names[:5])}, ...")
        if not is_number(value) or not 0 < value <= 1:
            raise ValueError(f"The distribution gives {name} the density {value!r}, which is not in (0, 1].")
    return dict(densities)


def why_dense(site: Site, density: Any, distribution: Distribution) -> Reason:
    """Say why `allocate` left out a site."""
    if isinstance(density, Mapping):
        return Reason(Why.RULE, "no density pattern matches")
    name = getattr(distribution, "__name__", "the distribution")
    return Reason(Why.RULE, f"first layer, dense under {name}" if site.index == 0 else f"left dense by {name}")


def density_for(
    flops: float, macs: Mapping[str, int], total: int, sites: Sequence[Site], distribution: Distribution, count: Count
) -> float:
    """Solve by bisection for the density at which a model costs a share of its dense inference FLOPs.

    Args:
        flops: the share, in (0, 1].
        macs: {parameter name: multiply-accumulates} of the dense model.
        total: multiply-accumulates of the whole dense model.
        sites: the weights that may be masked.
        distribution: spreads a density over them.
        count: rounds each weight's density to a count.

    Returns:
        The largest density, to 1e-9, that costs no more.

    Raises:
        ValueError: no density meets it; the message names the lowest share there is.
    """
    by_name = {site.name: site for site in sites}

    def ratio(density: float) -> float:
        spread = _spread(distribution, sites, density).items()
        saved = sum(macs.get(name, 0) * (1 - count(by_name[name], value) / by_name[name].size) for name, value in spread)
        return 1 - saved / total

    low, high = 1e-9, 1.0
    if not ratio(low) <= flops <= 1:
        raise ValueError(
            f"flops={flops!r} cannot be met: what stays dense costs {ratio(low):.4f} of the dense network already, so ask for "
            f"a ratio between that and 1, exclude fewer layers, or choose another distribution."
        )
    if ratio(high) <= flops:
        return high
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle) <= flops else (low, middle)
    return low
