"""Allocation: how many weights every site is to keep, from a density, a FLOP budget, a method's layout or given masks."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from passes.mask import masks_of
from passes.sites import Site
from sparsify.checks import is_number, matching
from sparsify.distributions import Distribution, solve_density
from sparsify.flops import flop_report
from sparsify.layouts import Layout


def allocate(sites: Sequence[Site], density: Any, distribution: Distribution, layout: Layout) -> dict[str, int]:
    """Say how many weights each site is to keep.

    Args:
        sites: the weights that may be masked.
        density: a number or {pattern: number}; not looked at where the layout fixes the counts.
        distribution: spreads a number over the sites.
        layout: rounds each weight's density to a count.

    Returns:
        {parameter name: count}; a site that is not in it stays dense by rule.

    Raises:
        ValueError: every weight would stay dense, or a density is out of range.
    """
    if layout.fixed:
        densities = dict.fromkeys((site.name for site in sites), 1.0)
    elif isinstance(density, Mapping):
        matching(density, [s.name for s in sites], "density")
        first = {s.name: next((d for p, d in density.items() if fnmatch.fnmatchcase(s.name, p)), None) for s in sites}
        densities = {name: value for name, value in first.items() if value is not None}
    else:
        densities = _spread(distribution, sites, density)
    if not densities:
        raise ValueError(
            "Every weight would stay dense, so there is nothing to mask: give a density pattern or another distribution."
        )
    return {site.name: layout.count(site, densities[site.name]) for site in sites if site.name in densities}


def _spread(distribution: Distribution, sites: Sequence[Site], density: float) -> dict[str, float]:
    """Ask a distribution, which may be anybody's function, and check what it says."""
    densities, names = distribution(sites, density), [site.name for site in sites]
    if not isinstance(densities, Mapping):
        raise ValueError(f"The distribution returned {densities!r}; it must return {{parameter name: density}}.")
    for name, value in densities.items():
        if name not in names:
            raise ValueError(
                f"The distribution names {name!r}, which is no weight; weights are {', '.join(names[:5])}, ..."
            )
        if not is_number(value) or not 0 < value <= 1:
            raise ValueError(f"The distribution gives {name} the density {value!r}, which is not in (0, 1].")
    return dict(densities)


def why_dense(site: Site, density: Any, distribution: Distribution) -> str:
    """Say why `allocate` left out a site."""
    if isinstance(density, Mapping):
        return "no density pattern matches"
    name = getattr(distribution, "__name__", "the distribution")
    return f"first layer, dense under {name}" if site.index == 0 else f"left dense by {name}"


def density_for(
    model: nn.Module, sites: Sequence[Site], distribution: Distribution, layout: Layout, flops: float, inputs: Any
) -> float:
    """Solve for the density at which the model costs a share of its dense inference FLOPs."""
    report = flop_report(model, inputs)
    macs = {layer.name: layer.dense_macs for layer in report.layers if layer.weight_shape}
    by_name = {site.name: site for site in sites}

    def ratio(density: float) -> float:
        saved = 0.0
        for name, value in _spread(distribution, sites, density).items():
            site = by_name[name]
            saved += macs.get(name, 0) * (1 - layout.count(site, value) / site.size)
        return 1 - saved / report.dense_macs

    return solve_density(ratio, flops)


def given_masks(masks: Any) -> dict[str, Tensor]:
    """Turn what users pass as `masks` into {parameter name: bool mask}.

    Raises:
        ValueError: it is neither a model that is sparse, by its masks or by zeros in its weights, nor such a mapping.
    """
    if isinstance(masks, nn.Module) and masks_of(masks):
        if all(mask.density == 1 for mask in masks_of(masks).values()):
            raise ValueError("masks is a model whose masks keep everything: nothing is pruned yet. Train it first.")
        return {name: mask.mask for name, mask in masks_of(masks).items()}
    if isinstance(masks, nn.Module):
        kept = {name: p.detach() != 0 for name, p in masks.named_parameters() if p.dim() > 1 and not p.is_meta}
        if not all(mask.all() for mask in kept.values()):
            return kept
        raise ValueError("masks is a model that has neither masks nor zeros in its weights. Prune it first.")
    if not isinstance(masks, Mapping) or not masks:
        raise ValueError(f"masks takes a sparse model or {{parameter name: bool mask}}, not {masks!r}.")
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"The mask of {name} is {found}, not torch.bool; `weight != 0` makes one of zeros in a weight."
            )
    return dict(masks)


def check_given(
    masks: Any, given: Mapping[str, Tensor], sites: Sequence[Site], rules: Mapping[str, str]
) -> dict[str, Tensor]:
    """Return the masks of the sites; `rules` says why other weights are dense.

    Raises:
        ValueError: at the first mask that does not fit the model, or weight that has none.
    """
    by_name = {site.name: site for site in sites}
    zeros = isinstance(masks, nn.Module) and not masks_of(masks)  # of which embeddings, for one, may have some too
    for name, why in rules.items() if zeros else ():
        if why.startswith("unsupported") and name in given and not given[name].all():
            raise ValueError(
                f"{name} has zeros, which training would fill, since it cannot be masked: "
                f"{why.removeprefix('unsupported: ')}. Mask it as it is read with include=[{name!r}], or let it become dense "
                f"with exclude=[{name!r}]."
            )
    masks = {name: mask for name, mask in given.items() if name in by_name or not zeros}
    for name, mask in masks.items():
        if name not in by_name:
            raise ValueError(
                f"masks are of another architecture: the first that does not fit is {name}, which this model has no maskable "
                f"weight for."
            )
        if tuple(mask.shape) != by_name[name].shape:
            raise ValueError(
                f"masks are of another architecture: the first that does not fit is {name}, of shape {tuple(mask.shape)}; the "
                f"model's weight has {by_name[name].shape}."
            )
        if mask.is_meta:
            raise ValueError(f"The mask of {name} is on the meta device, where masks have no values.")
        if not mask.any():
            raise ValueError(f"The mask of {name} keeps no weight; at least one of every layer must stay.")
    if missing := [site.name for site in sites if site.name not in masks]:
        raise ValueError(
            f"masks has none for {missing[0]}: they are of another architecture, or the weight is to stay dense "
            f"(exclude=[{missing[0]!r}])."
        )
    return masks
