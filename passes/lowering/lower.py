"""Lower: a dense model with zeros, as graphs of evaluation without batch norms and dead channels."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from passes.capture.captured import install
from passes.capture.lint import check_graphs
from passes.capture.regions import Capture, called_modules, trace
from passes.channels.prune import remove_dead_channels_
from passes.lowering.batch_norms import fold_batch_norms_


def lower_(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> nn.Module:
    """Lower a model in evaluation mode, in place.

    Args:
        model: with real tensors; its graphs of evaluation stand for both modes from now on.
        args: positional arguments to run it on.
        kwargs: keyword arguments.

    Returns:
        The same object. Its original forward no longer fits its layers.
    """
    capture = trace(model)
    evaluation = {path: dict.fromkeys((True, False), region.graphs[False]) for path, region in capture.regions.items()}
    regions = {path: replace(region, graphs=evaluation[path]) for path, region in capture.regions.items()}
    layers = {path: [m for _, m in called_modules(model.get_submodule(path), r.graphs)] for path, r in regions.items()}
    calls = Counter(layer for own in layers.values() for layer in own)
    # Layers that several graphs call stay as they are, and so do the graphs.
    alone = [path for path, own in layers.items() if all(calls[layer] == 1 for layer in own)]
    for path in alone:
        fold_batch_norms_(model.get_submodule(path), regions[path].graphs[False])
    check_graphs("folding batch norms", model, regions)
    install(model, Capture(regions, {}))
    for path in alone:
        vars(model.get_submodule(path))["keeps_graph"] = True
    for path, given in _inputs_of(model, alone, args, kwargs).items():
        remove_dead_channels_(model.get_submodule(path), regions[path].graphs[False], given)
    check_graphs("removing dead channels", model, regions)
    return model


@torch.no_grad()
def _inputs_of(
    model: nn.Module, regions: Iterable[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, tuple[Any, ...]]:
    """Run a model, and return what each region was called with, by position; regions that were not called are not there."""
    found: dict[str, tuple[Any, ...]] = {}
    handles = []
    for path in regions:
        module = model.get_submodule(path)

        def remember(module: Any, given: tuple[Any, ...], options: dict[str, Any], path: str = path) -> None:
            if not options:
                found.setdefault(path, given)

        handles.append(module.register_forward_pre_hook(remember, with_kwargs=True))
    model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return found
