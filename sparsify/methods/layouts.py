"""Layouts: the masks a layer may have - any elements or whole kernels; in `row_layouts`, a constant fan-in or N of every M.

A layout draws masks and exchanges weights inside one layer; how many are exchanged comes from a plan.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from passes.weights.sites import Site
from sparsify.density.distributions import kept
from sparsify.density.random_masks import random_mask
from sparsify.methods.scores import LayerState
from sparsify.methods.selection import drop_and_grow

Exchange = Callable[[LayerState, Tensor, Tensor | None, int, int], Tensor]  # (layer, leaving, coming, drop, grow) -> mask
Allows = Callable[[Tensor, int | None], bool]  # (mask, its dimension that indexes outputs) -> whether it is one


def _one(site: Site) -> int:
    return 1


def _any_mask(mask: Tensor, out_dim: int | None) -> bool:
    return True


def _nothing(site: Site) -> str:
    return ""


@dataclass(frozen=True)
class Layout:
    """A family of masks, as functions of one layer."""

    name: str
    count: Callable[[Site, float], int]  # how many weights a density keeps
    draw: Callable[[Site, int, int], Tensor]  # (site, count, seed): a random mask, on the CPU
    exchange: Exchange
    allows: Allows = _any_mask
    unit: Callable[[Site], int] = _one  # weights that are dropped or grown together
    refuse: Callable[[Site], str] = _nothing  # why a weight cannot have such a mask
    fixed: str = ""  # what decides the counts instead of a density, if anything does
    exact: bool = True  # whether an exchange keeps as many as it is told


# Elements: every mask.


def _element_count(site: Site, density: float) -> int:
    return kept(density, site.size)


def _draw_elements(site: Site, count: int, seed: int) -> Tensor:
    return random_mask(site.shape, count, seed, site.name)


def _exchange_elements(layer: LayerState, leaving: Tensor, coming: Tensor | None, drop: int, grow: int) -> Tensor:
    return drop_and_grow(leaving, coming, layer.mask, drop, grow)


ELEMENTS = Layout("elements", _element_count, _draw_elements, _exchange_elements)


# Kernels: all weights between one input and one output channel stay or go together, by the sum of their scores.


def _kernel_size(site: Site) -> int:
    return math.prod(site.shape[2:])


def _kernel_count(site: Site, density: float) -> int:
    unit = _kernel_size(site)
    return kept(density, site.size // unit) * unit


def _draw_kernels(site: Site, count: int, seed: int) -> Tensor:
    mask = random_mask(site.shape[:2], count // _kernel_size(site), seed, site.name)
    return _spread(mask, site.shape)


def _exchange_kernels(layer: LayerState, leaving: Tensor, coming: Tensor | None, drop: int, grow: int) -> Tensor:
    shape = layer.mask.shape
    mask = layer.mask.reshape(*shape[:2], -1)[..., 0]
    coming = None if coming is None else _kernel_sums(coming)
    return _spread(drop_and_grow(_kernel_sums(leaving), coming, mask, drop // layer.unit, grow // layer.unit), shape)


def _kernel_sums(scores: Tensor) -> Tensor:
    return scores.reshape(*scores.shape[:2], -1).abs().sum(-1)


def _spread(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    return mask.view(*shape[:2], *[1] * (len(shape) - 2)).expand(shape).contiguous()


def _whole_kernels(mask: Tensor, out_dim: int | None) -> bool:
    kernels = mask.reshape(*mask.shape[:2], -1)
    return bool((kernels == kernels[..., :1]).all())


KERNELS = Layout("kernels", _kernel_count, _draw_kernels, _exchange_kernels, _whole_kernels, _kernel_size)
