"""Lower: a dense model with zeros, as graphs of evaluation without batch norms and dead channels."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from passes.capture.captured import install
from passes.capture.lint import check_graphs
from passes.capture.regions import Capture, Region, called_modules, trace
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
    regions = {
        path: Region(
            {True: region.graphs[False], False: region.graphs[False]}, region.constants, region.arguments, region.through
        )
        for path, region in capture.regions.items()
    }
    for path, region in regions.items():
        fold_batch_norms_(model.get_submodule(path), region.graphs[False])
    check_graphs("folding batch norms", model, regions)
    install(model, Capture(regions, {}))
    shared = Counter(m for path, r in regions.items() for _, m in called_modules(model.get_submodule(path), r.graphs))
    for path, given in _inputs_of(model, regions, args, kwargs).items():
        module, graph = model.get_submodule(path), regions[path].graphs[False]
        if all(shared[m] == 1 for _, m in called_modules(module, regions[path].graphs)):
            remove_dead_channels_(module, graph, given)
        vars(module)["keeps_graph"] = True
    check_graphs("removing dead channels", model, regions)
    return model


@torch.no_grad()
def _inputs_of(
    model: nn.Module, regions: Mapping[str, Region], args: Sequence[Any], kwargs: Mapping[str, Any]
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
