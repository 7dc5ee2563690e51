"""Lower: a dense model with zeros as graphs of evaluation whose parts the kernels run."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from passes.capture.captured import Captured, install
from passes.capture.lint import check_graphs
from passes.capture.regions import Capture, called_modules, trace
from passes.channels.prune import remove_dead_channels_
from passes.lowering.attention import split_attention_
from passes.lowering.batch_norms import fold_batch_norms_
from passes.lowering.run import prepared
from passes.lowering.segments import Part, cut, learn_shapes, part_of, replace_

BACKENDS = ("auto", "measured", "native", "torch")
LEFT = "_left_in_torch"
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def lower_(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], backend: str) -> nn.Module:
    """Lower a model in evaluation mode, in place.

    Args:
        model: with real tensors; its graphs of evaluation stand for both modes from now on.
        args: positional arguments to run it on.
        kwargs: keyword arguments.
        backend: one of `BACKENDS`.

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
    inputs = _inputs_of(model, alone, args, kwargs)
    for path in [path for path in alone if path in inputs]:
        remove_dead_channels_(model.get_submodule(path), regions[path].graphs[False], inputs[path])
    check_graphs("removing dead channels", model, regions)
    left = vars(model)[LEFT] = dict[str, str]()
    if backend == "torch":
        return model
    for path in [path for path in alone if path in inputs]:
        module = model.get_submodule(path)
        left |= {_joined(path, name): why for name, why in _lower_graph_(module, inputs[path], backend).items()}
    check_graphs("choosing kernels", model, regions)
    return model


def left_in_torch(model: nn.Module) -> dict[str, str]:
    """Return the layers of a lowered model that torch goes on running, by path, and why, where that was decided."""
    layers = [path for path, module in model.named_modules() if isinstance(module, _LAYERS) and "weight" in module._parameters]
    return {path: vars(model).get(LEFT, {}).get(path, "the kernels were not asked to, or could not see it") for path in layers}


def _lower_graph_(module: nn.Module, inputs: Sequence[Any], backend: str) -> dict[str, str]:
    """Put segments into the graph of a module where they are faster; return which layers stay, and why."""
    assert isinstance(module, Captured)
    graph = module.graph
    learn_shapes(module, graph, inputs)
    split_attention_(module, graph)
    learn_shapes(module, graph, inputs)
    left = {str(n.target): "the kernels do not know it" for n in graph.nodes if n.op == "call_module"}
    parts = []
    for nodes, known in cut(module, graph):
        part = _part(module, nodes, known, backend)
        if isinstance(part, str):
            left |= {str(node.target): part for node in nodes if node.op == "call_module"}
        else:
            parts.append(part)
    replace_(module, graph, parts)
    module.layers_changed()
    return left


def _part(module: nn.Module, nodes: list[fx.Node], known: Any, backend: str) -> Part | str:
    """Return nodes as a part that the kernels run, or why they do not."""
    part = part_of(nodes, known)
    inputs = [torch.zeros(node.meta["tensor_meta"].shape) for node in part.inputs]
    plan = prepared(inputs, part.segment.values, part.segment.bits, part.segment.program)
    if isinstance(plan, str) or backend == "native":
        return plan if isinstance(plan, str) else part
    times = (plan.cycles, plan.torch_cycles)
    if backend == "measured":
        times = (_seconds(part.segment, inputs), _torch_seconds(module, part, inputs))
    said = "measured" if backend == "measured" else "predicted"
    return part if times[0] < times[1] else f"torch is {said} to take {times[1] / times[0]:.2f} of the time"


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _torch_seconds(module: nn.Module, part: Part, inputs: Sequence[torch.Tensor]) -> float:
    """Return how long torch takes for a part."""
    graph = fx.Graph()
    values = {node: graph.placeholder(node.name) for node in part.inputs}
    for node in part.nodes:
        values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(tuple(values[node] for node in part.outputs))
    return _seconds(fx.GraphModule(module, graph), inputs)


@torch.no_grad()
def _seconds(run: nn.Module, inputs: Sequence[torch.Tensor]) -> float:
    """Return the time of a call, the shortest of some."""
    found = []
    for _ in range(5):
        begin = time.perf_counter()
        run(*inputs)
        found.append(time.perf_counter() - begin)
    return min(found)


@torch.no_grad()
def _inputs_of(
    model: nn.Module, modules: Iterable[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, tuple[Any, ...]]:
    """Run a model, and return what each module was called with, by position; those that were not called are not there."""
    found: dict[str, tuple[Any, ...]] = {}
    handles = []
    for path in modules:
        module = model.get_submodule(path)

        def remember(module: Any, given: tuple[Any, ...], options: dict[str, Any], path: str = path) -> None:
            if not options:
                found.setdefault(path, given)

        handles.append(module.register_forward_pre_hook(remember, with_kwargs=True))
    model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return found
