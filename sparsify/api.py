"""The pipeline, as one straight line: trace, find weights, allocate densities, mask, attach the updater."""

import copy
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from passes.capture import trace
from passes.captured import install
from passes.fold import fold_
from passes.mask import Mask, masks_of
from passes.masking import mask_weights
from passes.sites import Site, find_sites
from sparsify.checks import as_patterns, check_budget, check_model, matching, resolve
from sparsify.distributions import DISTRIBUTIONS, Distribution, kept, solve_density
from sparsify.flops import flop_report
from sparsify.initialization import random_mask, rescale_to_fan_in
from sparsify.methods import METHODS, Method
from sparsify.updater import Updater

Patterns = Mapping[str, float]


def sparsify(
    model: nn.Module,
    density: float | Patterns | None = None,
    distribution: str | Distribution = "erk",
    *,
    method: str | Method = "rigl",
    flops: float | None = None,
    inputs: Any = None,
    exclude: Iterable[str] = (),
    include: Iterable[str] = (),
    init: str = "keep",
    seed: int = 0,
    inplace: bool = False,
) -> nn.Module:
    """Make a model sparse and ready for sparse training.

    The model is traced with torch.fx, every conv and linear weight that its graphs consume gets a mask, and
    `model.updater` will change the masks during training once an optimizer is attached to it.

    Args:
        model: any module, on any device; on the meta device masks exist by their counts only.
        density: the kept fraction, in (0, 1]. Overall under "er" and "erk"; of each masked weight under "uniform", which
            leaves the first layer dense. Or {pattern: density}, with fnmatch patterns on parameter names: the first that
            matches counts, and weights that none matches stay dense.
        distribution: "uniform", "er", "erk", or a function `(sites, density) -> {name: density}`.
        method: "rigl", "static", or a record such as `RigL(interval=50)`.
        flops: instead of `density`: the share of the dense inference FLOPs to keep, in (0, 1]; needs `inputs`.
        inputs: what `flop_report` takes; needed for `flops`. Where it is given, a run on its shapes proves that no product
            reads a weight that was not found.
        exclude: fnmatch patterns of parameter names that stay dense.
        include: fnmatch patterns of parameter names that are masked whatever reads them: embeddings, norm gains, weights of
            operations that are not known.
        init: "keep" leaves kept weights as they are; "fan_in" rescales them to the fan-in their mask leaves
            (arXiv 2010.03533), without which very sparse networks hardly train from scratch.
        seed: of the random masks.
        inplace: rewrite `model` itself instead of a copy, for models too large to have twice.

    Returns:
        An `fx.GraphModule` that is also an instance of the model's own class, in the same mode.

    Raises:
        TypeError: `model` is not a module.
        ValueError: an argument is out of range, unknown or contradictory; a pattern matches nothing; the model is sparse
            already or has nothing to mask; a parameter is consumed by an operation that is not known and is neither excluded
            nor included. Nothing was changed.

    Example:
        >>> model = sparsify(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), density=0.25)
        >>> sum(model.updater.nonzeros.values()), isinstance(model, torch.fx.GraphModule)
        (161, True)
    """
    check_model(model)
    check_budget(density, flops, inputs)
    distribution = resolve(distribution, DISTRIBUTIONS, "distribution", callable)
    method = resolve(method, METHODS, "method", lambda choice: isinstance(choice, Method))
    adapt_weights = resolve(init, INITS, "init", lambda choice: False)
    exclude, include = as_patterns(exclude, "exclude"), as_patterns(include, "include")
    names = [name for name, _ in model.named_parameters()]
    included = matching(include, names, "include")
    excluded = {
        name: f"excluded by {pattern!r}" for pattern in exclude for name in matching([pattern], names, "exclude")
    }

    model = model if inplace else copy.deepcopy(model)
    capture = trace(model)
    sites = find_sites(model, capture, included)
    rules = _dense_by_rule(sites, excluded)
    if inputs is not None:
        _prove_coverage(model, {*excluded, *(site.name for site in sites)}, inputs)
    candidates = [site for site in sites if site.name not in rules]
    if flops is not None:
        density = _density_for(model, candidates, distribution, flops, inputs)
    densities = _allocate(candidates, density, distribution)
    rules |= {site.name: _why_dense(site, density, distribution) for site in candidates if site.name not in densities}
    masks = _draw(model, sites, densities, seed)
    model = install(mask_weights(model, capture, masks), capture)
    adapt_weights(model, sites)
    model.updater = Updater(model, method, rules, capture.opaque)
    return model


def fold(model: nn.Module) -> nn.Module:
    """Return a plain dense copy of a sparsified model, with the masks baked in.

    The copy has the original class and runs the original forward; it exports and loads like any other model, and its
    `state_dict` has the keys that the original had. It costs what the dense model costs.

    Args:
        model: a model that `sparsify` returned; it is not changed.

    Returns:
        A model of the user's own class, in the same mode.

    Raises:
        ValueError: the model has no masks.

    Example:
        >>> plain = fold(sparsify(nn.Sequential(nn.Linear(8, 8)), density=0.5))
        >>> type(plain).__name__, int((plain[0].weight != 0).sum()), list(plain.state_dict())
        ('Sequential', 32, ['0.weight', '0.bias'])
    """
    if not isinstance(model, nn.Module) or not masks_of(model):
        raise ValueError("fold() takes a model that sparsify() returned; this one has no masks.")
    plain = copy.deepcopy(model)
    updater = plain.get_submodule("updater")
    assert isinstance(updater, Updater)
    updater.remove()
    return fold_(plain)


def _dense_by_rule(sites: Sequence[Site], excluded: Mapping[str, str]) -> dict[str, str]:
    if not sites:
        raise ValueError("The model has nothing to mask: no convolution or linear layer consumes a parameter.")
    rules = {s.name: excluded.get(s.name, s.problem) for s in sites if s.problem or s.name in excluded}
    for name, why in rules.items():
        if why.startswith("unknown"):
            raise ValueError(
                f"{name} may be a weight or not: {why.removeprefix('unknown: ')}. Keep it dense with exclude=[{name!r}], or "
                f"mask it as it is read with include=[{name!r}]."
            )
    if len(rules) == len(sites):
        raise ValueError(
            f"The model has nothing left to mask: {'; '.join(f'{name}: {why}' for name, why in rules.items())}"
        )
    return rules


def _prove_coverage(model: nn.Module, known: set[str], inputs: Any) -> None:
    """Raise if a product reads a parameter that is not known, wherever the code is that runs it."""
    for layer in flop_report(model, inputs).layers:
        if layer.dense_macs and layer.weight_shape and layer.name not in known:
            raise ValueError(
                f"{layer.name} is multiplied by ({layer.op}), but no graph shows that it is a weight. Keep it dense with "
                f"exclude=[{layer.name!r}], or mask it as it is read with include=[{layer.name!r}]."
            )


def _allocate(sites: Sequence[Site], density: Any, distribution: Distribution) -> dict[str, float]:
    if isinstance(density, Mapping):
        matching(density, [s.name for s in sites], "density")
        first = {s.name: next((d for p, d in density.items() if fnmatch.fnmatchcase(s.name, p)), None) for s in sites}
        densities = {name: value for name, value in first.items() if value is not None}
    else:
        densities = distribution(sites, density)
    if not densities:
        raise ValueError(
            "Every weight would stay dense, so there is nothing to mask: give a density pattern or another distribution."
        )
    for name, value in densities.items():
        if not 0 < value <= 1:
            raise ValueError(f"The distribution gives {name} the density {value!r}, which is not in (0, 1].")
    return densities


def _why_dense(site: Site, density: Any, distribution: Distribution) -> str:
    if isinstance(density, Mapping):
        return "no density pattern matches"
    name = getattr(distribution, "__name__", "the distribution")
    return f"first layer, dense under {name}" if site.index == 0 else f"left dense by {name}"


def _density_for(
    model: nn.Module, sites: Sequence[Site], distribution: Distribution, flops: float, inputs: Any
) -> float:
    report = flop_report(model, inputs)
    macs = {layer.name: layer.dense_macs for layer in report.layers if layer.weight_shape}
    sizes = {site.name: site.size for site in sites}

    def ratio(density: float) -> float:
        densities = distribution(sites, density)
        saved = sum(macs.get(name, 0) * (1 - kept(d, sizes[name]) / sizes[name]) for name, d in densities.items())
        return 1 - saved / report.dense_macs

    return solve_density(ratio, flops)


def _draw(model: nn.Module, sites: Sequence[Site], densities: Mapping[str, float], seed: int) -> dict[str, Mask]:
    masks = {}
    for site in sites:
        if site.name in densities:
            weight = model.get_parameter(site.name)
            count = kept(densities[site.name], site.size)
            masks[site.name] = Mask(_mask_like(weight, site, count, seed), count)
    return masks


def _mask_like(weight: torch.Tensor, site: Site, count: int, seed: int) -> torch.Tensor:
    """Draw a mask with the device and strides of its weight."""
    if weight.is_meta:
        return torch.empty_strided(weight.shape, weight.stride(), dtype=torch.bool, device="meta")
    mask = random_mask(site.shape, count, seed, site.name).to(weight.device)
    return mask if mask.stride() == weight.stride() else torch.empty_like(weight, dtype=torch.bool).copy_(mask)


def _keep_weights(model: nn.Module, sites: Sequence[Site]) -> None:
    """Leave kept weights as they are."""


def _rescale_weights(model: nn.Module, sites: Sequence[Site]) -> None:
    masks = masks_of(model)
    for site in sites:
        if site.name in masks:
            rescale_to_fan_in(model.get_parameter(site.name), masks[site.name].mask, site.uses[0].out_dim)


INITS = {"keep": _keep_weights, "fan_in": _rescale_weights}
