"""The pipeline, as one straight line: trace, find weights, allocate densities, mask, attach the updater."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from passes.capture.captured import install
from passes.capture.copies import copied
from passes.capture.lint import check_graphs
from passes.capture.regions import Capture, trace
from passes.capture.verify import faithful_capture
from passes.counting.inputs import forward_values
from passes.counting.tally import tally
from passes.lowering.segment import refuse_lowered
from passes.masking.fold import unmask_
from passes.masking.kernels import KERNELS, use_kernels
from passes.masking.mask import Mask, zero_dropped_weights_
from passes.masking.rewrite import check_masked, mask_weights
from passes.weights.reasons import Reason, Why
from passes.weights.sites import Site, find_sites
from sparsify import checks
from sparsify.density.allocation import allocate, density_for, why_dense
from sparsify.density.coverage import dense_by_rule
from sparsify.density.distributions import DISTRIBUTIONS, Distribution
from sparsify.density.given import check_given, given_masks
from sparsify.methods.initial_values import INITS
from sparsify.methods.layouts import ELEMENTS
from sparsify.methods.method import Goal, Method
from sparsify.methods.published import METHODS
from sparsify.training.lookup import updater_of
from sparsify.training.ranks import ignore_in_ddp
from sparsify.training.updater import Updater

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
    blocks: Iterable[str] = (),
    masks: nn.Module | Mapping[str, torch.Tensor] | None = None,
    init: str = "keep",
    kernels: str = "masked",
    seed: int = 0,
    inplace: bool = False,
    verify: bool = False,
) -> nn.Module:
    """Make a model sparse and ready for sparse training.

    The model is traced with torch.fx, every conv, linear, attention and recurrent weight that it uses gets a mask, and
    `model.updater` will change the masks during training once an optimizer is attached to it.

    Args:
        model: any module, on any device; on the meta device masks exist by their counts only.
        density: the kept fraction of the weights that are masked, in (0, 1]. Overall under "er" and "erk"; of each masked
            weight under "uniform", which leaves the first layer dense. Or {pattern: density}, with fnmatch patterns on
            parameter names: the first that matches counts, and weights that none matches stay dense.
        distribution: "uniform", "er", "erk", or a function `(sites, density) -> {name: density}`.
        method: a name ("rigl", "static", "set", "snfs", "gmp", "snip", "srigl", "nm", ...) or a record such as
            `RigL(interval=50)`. "gmp" and "snip" start dense, and the density is where they end.
        flops: instead of `density`: the share of the dense inference FLOPs to keep, in (0, 1]; needs `inputs`.
        inputs: what `flop_report` takes; needed for `flops` and `verify`. Where it is given, a run on its shapes finds what
            Python code multiplies by, and proves that every masked weight is used through its mask.
        exclude: fnmatch patterns of parameter names that stay dense.
        include: fnmatch patterns of parameter names that are masked in any case: embeddings, norm gains, weights of
            operations that are not known.
        blocks: patterns of module paths, in which `*` stops at dots ("layer?.*", "encoder.layers.*"): these modules go on
            being called as modules, each with a graph of its own, as `fully_shard` per block and hooks need it.
        masks: instead of a density: a sparsified model to take the masks of, a pruned dense one whose zeros say what is dropped
            (such as `model` itself), or {parameter name: bool mask}. With the weights that a trained network started from
            they make a lottery ticket (arXiv 1803.03635), with fresh ones a re-used topology.
        init: "keep" leaves kept weights as they are; "fan_in" rescales them to the fan-in their mask leaves
            (arXiv 2010.03533), without which very sparse networks hardly train from scratch.
        kernels: what masked layers run in training on the CPU: "masked", torch's operations on masked weights; "sparse", sums
            over kept weights only, with batch norm, addition and ReLU in one; "auto", these where they are faster by a model of
            their cost. Nothing that is saved depends on it, and `use_kernels` changes it at any time.
        seed: of the random masks.
        inplace: rewrite `model` itself instead of a copy, for models too large to have twice.
        verify: run the model and its graphs on `inputs` (random numbers where that is a shape), in both modes, and compare
            outputs, their types, gradients and buffers. A region that differs stays Python, with a warning. Takes the time and
            memory of some training steps.

    Returns:
        A model that is an instance of its own class, in the same mode, and an `fx.GraphModule` where fx traces it whole. Of one
        that does not, the parts are: see `graphs`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: an argument is out of range, unknown or contradictory; a pattern matches nothing; the model is sparse
            already or has nothing to mask; a parameter is consumed by an operation that is not known and is neither excluded
            nor included, or is read past its mask; the inputs do not fit, or verification cannot run. Nothing was changed.

    Example:
        >>> model = sparsify(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), density=0.25)
        >>> sum(model.updater.nonzeros.values()), isinstance(model, torch.fx.GraphModule)
        (161, True)
    """
    checks.check_model(model)
    refuse_lowered(model, "sparsify")
    distribution = checks.resolve(distribution, DISTRIBUTIONS, "distribution", callable)
    method = checks.resolve(method, METHODS, "method", lambda choice: isinstance(choice, Method))
    checks.check_budget(density, flops, inputs, _fixed_by(method, masks, flops))
    set_weights = checks.resolve(init, INITS, "init")
    checks.resolve(kernels, dict.fromkeys(KERNELS), "kernels")
    seed = checks.as_seed(seed)
    exclude, include = checks.as_patterns(exclude, "exclude"), checks.as_patterns(include, "include")
    names = [name for name, _ in model.named_parameters()]
    paths = checks.matching_paths(checks.as_patterns(blocks, "blocks"), model)
    included = checks.matching(include, names, "include")
    excluded = _excluded(exclude, masks, names)
    given = given_masks(masks) if masks is not None else {}
    checks.check_verification(verify, inputs)

    model = model if inplace else copied(model)
    capture = _verified(model, paths, inputs) if verify else trace(model, paths)
    check_graphs("capture", model, capture.regions)
    costs = tally(model, inputs) if inputs is not None else None
    sites = find_sites(model, capture, included, costs.ops if costs else None)
    reasons = dense_by_rule(sites, excluded, method.layout.refuse)
    candidates = [site for site in sites if site.name not in reasons]
    given = check_given(masks, given, candidates, reasons) if masks is not None else {}
    if flops is not None and costs:
        density = density_for(flops, costs.weights, costs.macs, candidates, distribution, method.layout.count)
    density = {"*": 1.0} if method.layout.fixed else density
    counts = {name: int(mask.sum()) for name, mask in given.items()} or allocate(
        candidates, density, distribution, method.layout.count
    )
    reasons |= {s.name: why_dense(s, density, distribution) for s in candidates if s.name not in counts}
    masked = [site for site in candidates if site.name in counts]
    checks.check_names(model, [site.name for site in masked])
    goals = {site.name: Goal(counts[site.name], method.layout.unit(site), site.uses[0].out_dim) for site in masked}
    first = {site.name: _mask(model, site, goals[site.name], given.get(site.name), method, seed) for site in masked}
    model = install(mask_weights(model, capture, first), capture)
    check_graphs("masking", model, capture.regions)
    _check_reads(model, inputs if capture.opaque else None)
    zero_dropped_weights_(model)
    if set_weights:
        set_weights(model, sites)
    model.updater = Updater(model, method, goals, reasons, seed)
    ignore_in_ddp(model)
    return use_kernels(model, kernels) if kernels != "masked" else model


def _excluded(patterns: Iterable[str], masks: Any, names: Sequence[str]) -> dict[str, Reason]:
    """Return why weights stay dense: a pattern excludes them, or they are dense in the model that masks are taken of."""
    by_pattern = {p: checks.matching([p], names, "exclude") for p in patterns}
    found = {name: Reason(Why.RULE, f"excluded by {p!r}") for p, matches in by_pattern.items() for name in matches}
    updater = updater_of(masks) if isinstance(masks, nn.Module) else None
    return found | {name: why for name, why in (updater.reasons if updater else {}).items() if name in names}


def _fixed_by(method: Method, masks: Any, flops: float | None) -> str:
    """Say what fixes the number of kept weights, if it is not a density."""
    if flops is not None and method.total_only:
        raise ValueError(f"flops={flops!r} cannot be met by method {method.name!r}: which layers it prunes is up to the data.")
    if masks is None:
        return f"method {method.name!r} with {method.layout.fixed}" if method.layout.fixed else ""
    if method.prunes or method.layout is not ELEMENTS:
        why = "starts dense" if method.prunes else f"draws masks of {method.layout.name}"
        raise ValueError(f"masks and method {method.name!r} contradict: it {why}. Use 'static', 'rigl' or another method.")
    return "masks"


def _verified(model: nn.Module, blocks: Sequence[str], inputs: Any) -> Capture:
    """Trace a model, and compare what the graphs compute with what it computes."""
    capture = faithful_capture(model, blocks, *forward_values(model, inputs))
    for path, reason in capture.opaque.items():
        if reason.startswith("verification"):
            warnings.warn(f"{path or type(model).__name__!r} stays Python code. {reason.capitalize()}.", stacklevel=3)
    return capture


def _check_reads(model: nn.Module, inputs: Any) -> None:
    """Raise, and undo the rewrite, if something reads a masked weight past its mask."""
    check_masked(model)
    past = tally(model, inputs).past_masks if inputs is not None else []
    if past:
        unmask_(model)
        name = past[0].partition(" ")[0]
        raise ValueError(
            f"{past[0]} is read past its mask, by code that does not name it as an attribute (such as parameters() or a "
            f"list). Keep it dense with exclude=[{name!r}]."
        )


def _mask(model: nn.Module, site: Site, goal: Goal, given: torch.Tensor | None, method: Method, seed: int) -> Mask:
    """Make a weight's first mask, with the weight's device and strides."""
    weight = model.get_parameter(site.name)
    count = site.size if method.prunes else goal.target
    if weight.is_meta:
        return Mask(torch.empty_strided(weight.shape, weight.stride(), dtype=torch.bool, device="meta"), count)
    if given is not None:
        mask = given
    elif count == site.size:
        mask = torch.ones(site.shape, dtype=torch.bool)
    else:
        mask = method.layout.draw(site, count, seed)
    return Mask(torch.empty_like(weight, dtype=torch.bool).copy_(mask), count)
