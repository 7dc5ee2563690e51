"""How many weights each layer drops and grows in an update, as plans.

A plan is a function `(layers, amount) -> [(drop, grow)]`. The amount is the share of active weights to drop for a method that
keeps its density, and the share of the final sparsity to have reached for one that prunes. Counts are Python integers; a plan
that compares layers reads the device once.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch

from sparsify.methods.scores import LayerState, Score, evaluate
from sparsify.methods.selection import select

Plan = Callable[[Sequence[LayerState], float], list[tuple[int, int]]]


def steady(layers: Sequence[LayerState], fraction: float) -> list[tuple[int, int]]:
    """Grow in each layer what it drops: floor(fraction * nonzeros) (RigL, Algorithm 1)."""
    drops = [steady_drop(layer.nonzeros, layer.unit, fraction) for layer in layers]
    return list(zip(drops, drops, strict=True))


def steady_drop(nonzeros: int, unit: int, fraction: float) -> int:
    """Return how many of a layer's kept weights a fraction drops, in whole units."""
    return math.floor(fraction * nonzeros / unit) * unit


def redistribute(score: Score, layers: Sequence[LayerState], fraction: float) -> list[tuple[int, int]]:
    """Drop as `steady` does, and grow where the mean |score| of the active weights is high (SNFS, arXiv 1907.04840).

    The total count stays exactly as it is, no layer exceeds its size, and one whose score is zero everywhere keeps its count.
    """
    drops = [drop for drop, _ in steady(layers, fraction)]
    sums = [torch.where(x.mask, evaluate(score, x), 0).abs().sum(dtype=torch.float64).to(layers[0].mask.device) for x in layers]
    shares = [total / layer.nonzeros for total, layer in zip(torch.stack(sums).tolist(), layers, strict=True)]
    live = [i for i, share in enumerate(shares) if share]
    room = [layers[i].mask.numel() - layers[i].nonzeros + drops[i] for i in live]
    grown = dict(zip(live, apportion(sum(drops[i] for i in live), [shares[i] for i in live], room), strict=True))
    return [(drop, grown.get(i, drop)) for i, drop in enumerate(drops)]


def apportion(total: int, shares: Sequence[float], room: Sequence[int]) -> list[int]:
    """Divide a whole number in proportion to shares, by the largest remainder, none above its room; ties go to the first.

    Args:
        total: what to divide, at most the sum of `room`.
        shares: from 0; what is left when every layer of positive share is full goes by room.
        room: the most that each may get.

    Returns:
        One whole number per share; they add up to `total`.

    Example:
        >>> apportion(10, [3.0, 1.0, 1.0], [4, 100, 100]), apportion(7, [1.0, 0.0], [5, 5])
        ([4, 3, 3], [5, 2])
    """
    given = [0] * len(shares)
    while left := total - sum(given):
        open_ = [i for i, n in enumerate(room) if given[i] < n]
        weights = [Fraction(shares[i]) for i in open_]  # exact, so that floors never add up to more than is left
        if not sum(weights):
            weights = [Fraction(room[i] - given[i]) for i in open_]
        quotas = {i: left * weight / sum(weights) for i, weight in zip(open_, weights, strict=True)}
        full = [i for i in open_ if given[i] + quotas[i] >= room[i]]
        if full:  # they get what fits, and the rest is divided anew
            for i in full:
                given[i] = room[i]
            continue
        parts = {i: math.floor(quota) for i, quota in quotas.items()}
        spare = left - sum(parts.values())
        for i in sorted(open_, key=lambda i: parts[i] - quotas[i])[:spare]:
            parts[i] += 1
        for i, part in parts.items():
            given[i] += part
    return given


def prune(layers: Sequence[LayerState], reached: float) -> list[tuple[int, int]]:
    """Drop in each layer what takes it to a share of its final sparsity (Zhu & Gupta, arXiv 1710.01878)."""
    return [(max(0, layer.nonzeros - _goal(layer, reached)), 0) for layer in layers]


def prune_global(score: Score, layers: Sequence[LayerState], reached: float) -> list[tuple[int, int]]:
    """Drop what `prune` drops in sum, but the weights of lowest |score| among all layers, by one selection.

    The highest of every layer is out of the selection, so that none is emptied.
    """
    total = sum(layer.nonzeros - _goal(layer, reached) for layer in layers)
    if total <= 0:
        return [(0, 0)] * len(layers)
    device = layers[0].mask.device
    scores = torch.cat([evaluate(score, layer).flatten().to(device) for layer in layers])
    among = torch.cat([layer.mask.flatten().to(device) for layer in layers])
    sizes = [layer.mask.numel() for layer in layers]
    for part, active in zip(scores.split(sizes), among.split(sizes), strict=True):
        best = torch.where(active, part.abs(), -1).argmax(keepdim=True)
        active.scatter_(0, best, False)
    total = min(total, sum(layer.nonzeros - 1 for layer in layers))
    dropped = select(scores, total, among, lowest=True)
    return [(drop, 0) for drop in torch.stack([part.sum() for part in dropped.split(sizes)]).tolist()]


def _goal(layer: LayerState, reached: float) -> int:
    """Return how many weights a layer keeps when a share of its final sparsity is reached."""
    size = layer.mask.numel()
    return size - math.floor(reached * (size - layer.target) / layer.unit + 1e-6) * layer.unit
