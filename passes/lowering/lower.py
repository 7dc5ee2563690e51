"""Lower: a dense model with zeros as graphs of evaluation whose parts the kernels run."""

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from passes.capture.captured import install
from passes.capture.frames import is_generated, is_users, module_of
from passes.capture.leaves import is_builtin
from passes.capture.lint import check_graphs
from passes.capture.regions import Capture, Region, called_modules, trace
from passes.channels.prune import remove_dead_channels_
from passes.lowering.attention import join_heads_, split_attention_
from passes.lowering.batch_norms import fold_batch_norms_
from passes.lowering.inline import inline_
from passes.lowering.run import prepared
from passes.lowering.segments import Part, cut, learn_shapes, part_of, replace_
from passes.lowering.whole import attach_, exported

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
    install(model, Capture(regions, {}))
    inputs, expected = _observe(model, regions, args, kwargs)
    for path in inputs:
        fold_batch_norms_(model.get_submodule(path), regions[path].graphs[False])
    inline_(model, {path: regions[path].graphs[False] for path in inputs})
    check_graphs("folding batch norms", model, regions)
    for path, given in inputs.items():
        module: Any = model.get_submodule(path)
        vars(module)["keeps_graph"] = True
        module.layers_changed()
        remove_dead_channels_(module, regions[path].graphs[False], given)
    check_graphs("removing dead channels", model, regions)
    whole = exported(model, args, kwargs) if capture.opaque and backend != "torch" else None
    left = vars(model)[LEFT] = dict[str, str]()
    for path, given in inputs.items() if backend != "torch" else ():
        module = model.get_submodule(path)
        left |= {f"{path}.{name}".lstrip("."): why for name, why in _lower_graph_(module, module.graph, given, backend).items()}
        module.layers_changed()
    check_graphs("choosing kernels", model, regions)
    with torch.no_grad():
        _compare(expected, model(*args, **kwargs))
        if whole:
            _lower_graph_(whole.module, whole.module.graph, whole.flat(args, kwargs) or [], backend)
            whole.module.recompile()
            attach_(model, whole)
            _compare(expected, model(*args, **kwargs))
    return model


@torch.no_grad()
def _observe(
    model: nn.Module, regions: Mapping[str, Region], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[dict[str, tuple[Any, ...]], Any]:
    """Run a model; return what regions were called with, by position, and the output.

    Regions that were not called are not there. Others stay as they are, too: those that were called otherwise than their graph
    holds for, those whose layers something else calls besides, another graph or Python code, and those whose parameters Python
    code reads.
    """
    inputs: dict[str, tuple[Any, ...]] = {}
    unfit: set[str] = set()
    calls: Counter[nn.Module] = Counter()
    named: Counter[nn.Module] = Counter()  # by the graphs that ran
    handles = []
    for path, region in regions.items():
        root, own = model.get_submodule(path), [str(n.target) for n in region.graphs[False].nodes if n.op == "call_module"]
        layers = [root.get_submodule(target) for target in own]

        def remember(_: Any, given: tuple[Any, ...], options: dict[str, Any], path: str = path, layers: Any = layers) -> None:
            named.update(layers)
            bound = _bound(regions[path].graphs[False], given, options)
            if bound is None or not regions[path].arguments.fit(given, options):
                unfit.add(path)
            else:
                inputs.setdefault(path, bound)

        handles.append(root.register_forward_pre_hook(remember, with_kwargs=True))
        handles += [layer.register_forward_pre_hook(lambda layer, _: calls.update([layer])) for layer in dict.fromkeys(layers)]
    try:
        with _reads_of_parameters() as read:
            output = model(*args, **kwargs)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{type(model).__name__} does not run on these inputs. {type(error).__name__}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    layers = {path: _layers_of(model.get_submodule(path), region.graphs) for path, region in regions.items()}
    owners = Counter(layer for own in layers.values() for layer in own)
    alone = {p for p, own in layers.items() if all(owners[layer] == 1 and calls[layer] <= named[layer] for layer in own)}
    alone -= unfit | {p for p, own in layers.items() if not read.isdisjoint((model.get_submodule(p), *own))}
    return {path: given for path, given in inputs.items() if path in alone}, output


@contextlib.contextmanager
def _reads_of_parameters() -> Iterator[set[nn.Module]]:
    """Yield the modules whose parameters Python code of the user's, and not a graph, reads while the block runs."""
    found: set[nn.Module] = set()
    get = nn.Module.__getattr__

    def remember(self: nn.Module, name: str) -> Any:
        frame: FrameType | None = sys._getframe(1)
        while frame and module_of(frame).startswith("passes."):
            frame = frame.f_back
        if frame and name in self._parameters and is_users(module_of(frame)) and not is_generated(frame):
            found.add(self)
        return get(self, name)

    with mock.patch.object(nn.Module, "__getattr__", remember):
        yield found


def _bound(graph: fx.Graph, given: Sequence[Any], options: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return the arguments of a graph in order, None where it takes others."""
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    values = {str(node.target): node.args[0] for node in nodes if node.args}
    values |= {**dict(zip((str(node.target) for node in nodes), given, strict=False)), **options}
    names = [str(node.target) for node in nodes]
    return tuple(values[name] for name in names) if values.keys() == {*names} and len(given) <= len(names) else None


def _compare(expected: Any, output: Any) -> None:
    """Raise if a lowered model computes something else. Where it also chooses (detections), small differences are none."""
    pairs = list(zip(tree_leaves(expected), tree_leaves(output), strict=False))
    tensors = [(a, b) for a, b in pairs if isinstance(a, torch.Tensor)]
    if not all(a.is_floating_point() and a.shape == b.shape for a, b in tensors):
        return
    for a, b in tensors:
        scale, difference = a.nan_to_num(0, 0, 0).abs().max(), (a - b).nan_to_num(0, 0, 0).abs().max()
        if difference > 1e-2 * scale:
            raise ValueError(
                f"Lowering changed what the model computes, by {float(difference / scale):.2g} of its largest output: Python "
                f"code of it may read layers that were folded. Lower the parts of it that do not, or take fold(model)."
            )


def _layers_of(module: nn.Module, graphs: Mapping[bool, fx.Graph]) -> list[nn.Module]:
    """Return what the graphs of a region call, or the region itself where Python code calls a layer."""
    return [module] if is_builtin(module) else [called for _, called in called_modules(module, dict(graphs))]


def left_in_torch(model: nn.Module) -> dict[str, str]:
    """Return the layers of a lowered model that torch goes on running, by path, and why, where that was decided."""
    layers = [path for path, module in model.named_modules() if isinstance(module, _LAYERS) and "weight" in module._parameters]
    return {path: vars(model).get(LEFT, {}).get(path, "the kernels were not asked to, or could not see it") for path in layers}


def _lower_graph_(module: nn.Module, graph: fx.Graph, inputs: Sequence[Any], backend: str) -> dict[str, str]:
    """Put segments into a graph of a module where they are faster; return which layers stay, and why."""
    learn_shapes(module, graph, inputs)
    if split_attention_(module, graph) | join_heads_(graph):
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
