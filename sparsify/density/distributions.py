"""Distributions: how a density is spread over the weights of a network.

A distribution is a function `(sites, density) -> {parameter name: density}`; a weight it does not name stays dense by rule.
All counts follow one rounding rule, `kept`.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from passes.weights.sites import Site

Distribution = Callable[[Sequence[Site], float], dict[str, float]]


def kept(density: float, size: int) -> int:
    """Return how many of `size` weights a density keeps: at least 1, and floor(sparsity * size) zeros.

    The 1e-6 keeps float error from adding a weight where density * size is a whole number.

    Example:
        >>> kept(0.1, 1000), kept(0.1, 1001), kept(1e-9, 1000)
        (100, 101, 1)
    """
    return max(1, math.ceil(density * size - 1e-6))


def uniform(sites: Sequence[Site], density: float) -> dict[str, float]:
    """Give every weight the same density; the network's first stays dense by rule, as in the RigL paper (section 3(1)).

    The overall density is therefore higher than `density`.

    Args:
        sites: the weights, in `named_parameters()` order.
        density: of each weight, in (0, 1].

    Returns:
        {parameter name: density}, without the network's first weight.
    """
    return {site.name: density for site in sites if site.index > 0}


def er(sites: Sequence[Site], density: float) -> dict[str, float]:
    """Erdős-Rényi (SET, arXiv 1707.04780): density_l proportional to (n_in + n_out) / (n_in * n_out).

    Args:
        sites: the weights; n_out and n_in are the first two dimensions as stored, of each expert in a stack.
        density: overall, in (0, 1].

    Returns:
        {parameter name: density}.
    """
    sizes = {s.name: s.matrix_shape[:2] for s in sites}
    return _scaled({name: sum(size) / math.prod(size) for name, size in sizes.items()}, sites, density)


def erk(sites: Sequence[Site], density: float) -> dict[str, float]:
    """Erdős-Rényi-Kernel (RigL, arXiv 1911.11134, section 3(1)): density_l proportional to sum(shape) / prod(shape).

    Args:
        sites: the weights, with their shapes as stored; of a stack of experts, that of each.
        density: overall, in (0, 1].

    Returns:
        {parameter name: density}.

    Example:
        >>> from passes import find_sites, trace
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(10, 100), nn.Linear(100, 100))
        >>> erk(find_sites(model, trace(model)), 0.1)
        {'0.weight': 0.3903225806451613, '1.weight': 0.07096774193548387}
    """
    return _scaled({s.name: sum(s.matrix_shape) / math.prod(s.matrix_shape) for s in sites}, sites, density)


def _scaled(raw: Mapping[str, float], sites: Sequence[Site], density: float) -> dict[str, float]:
    """Solve for eps in density_l = min(1, eps * raw_l) so that the overall density is met.

    Whenever a density would exceed 1, every layer at the highest raw score goes dense and eps is solved again for the rest.
    The weights to hand out are those of every layer at `density`, each rounded as `kept` does: the published eps.
    """
    sizes = {site.name: site.size for site in sites}
    total = sum(kept(density, size) for size in sizes.values())
    dense: set[str] = set()
    while len(dense) < len(sizes):
        rest = [name for name in sizes if name not in dense]
        budget = total - sum(sizes[name] for name in dense)
        eps = budget / sum(raw[name] * sizes[name] for name in rest)
        top = max(raw[name] for name in rest)
        if eps * top <= 1:
            return {name: 1.0 if name in dense else eps * raw[name] for name in sizes}
        dense.update(name for name in rest if raw[name] == top)
    return dict.fromkeys(sizes, 1.0)


DISTRIBUTIONS: dict[str, Distribution] = {"uniform": uniform, "er": er, "erk": erk}
