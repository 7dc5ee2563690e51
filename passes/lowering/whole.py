"""Whole: one graph of a model whose Python code fx cannot trace, by torch.export, for calls like the one that is given.

The code of a transformer asks about optional arguments, sizes and settings; `passes.capture` leaves it as it is, and makes graphs
of what lies inside. Inference is told how the model is called. Calls of other arguments or sizes run the code, as before.
"""

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ShapesCollection, export
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from passes.capture.copies import hooks_of
from passes.capture.effects import Snapshot
from passes.capture.leaves import has_hooks
from passes.lowering.segment import Segment
from passes.torch_ops import name_of

_GUARDS = "_guards_fn"  # torch's check of what the graph assumes of its inputs, where torch has it


@dataclass(frozen=True)
class Exported:
    """A graph of flat inputs and outputs.

    Attributes:
        module: a GraphModule that runs it.
        inputs, outputs: how arguments and results are put together.
        leaves: of each flat input, its number format and sizes, each a number or a name; or the value that it must have.
        limits: the least and the largest of the sizes with names.
        guards: raises where the graph does not hold.
    """

    module: fx.GraphModule
    inputs: TreeSpec
    outputs: TreeSpec
    leaves: tuple[Any, ...]
    limits: dict[str, tuple[float, float]]
    guards: Any

    def flat(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any] | None:
        """Return the inputs of the graph for a call, None where it does not hold for it."""
        found, spec = tree_flatten((tuple(args), dict(kwargs)))
        sizes: dict[str, int] = {}
        if spec != self.inputs or not all(_is_like(x, leaf, sizes) for x, leaf in zip(found, self.leaves, strict=True)):
            return None
        if not all(low <= sizes[name] <= high for name, (low, high) in self.limits.items() if name in sizes):
            return None
        try:
            if self.guards:
                self.guards(*found)
        except (AssertionError, RuntimeError):
            return None
        return found


def _is_like(value: Any, leaf: Any, sizes: dict[str, int]) -> bool:
    if not isinstance(leaf, tuple):
        return value is leaf or (type(value) is type(leaf) and not isinstance(value, Tensor) and value == leaf)
    if not isinstance(value, Tensor) or (value.dtype, value.device.type, value.dim()) != (*leaf[:2], len(leaf) - 2):
        return False
    return all(size == (sizes.setdefault(of, size) if isinstance(of, str) else of) for size, of in zip(value.shape, leaf[2:], strict=True))


def exported(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Exported | None:
    """Return a graph of a model in evaluation mode for calls like this one, None where torch.export makes none that can be trusted.

    Args:
        model: whose weights the graph shares.
        args: positional arguments.
        kwargs: keyword arguments.
    """
    if any(map(has_hooks, model.modules())):
        return None
    sizes, state = ShapesCollection(), Snapshot(model.modules(), hooks_of(model))
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            sizes[leaf] = {dim: Dim.AUTO for dim, size in enumerate(leaf.shape) if size > 1}  # others are taken as they are
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model(*args, **kwargs)
            if state.difference():  # a graph would write it once
                return None
            program = export(model, tuple(args), dict(kwargs), dynamic_shapes=sizes, strict=False)
            module: Any = program.module()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # whatever torch.export and the model's code raise: the code stays as it is
        return None
    finally:
        state.restore()  # torch.export puts copies of attributes in their places
    if program.graph_signature.buffers_to_mutate or program.graph_signature.user_inputs_to_mutate:
        return None
    graph, guards = module.graph, getattr(module, _GUARDS, None)
    for node in [n for n in graph.nodes if n.op == "call_module" and n.target == _GUARDS]:
        graph.erase_node(node)
    graph.set_codegen(fx.graph.CodeGen())
    _name_layers(graph)
    assert program.call_spec.in_spec is not None and program.call_spec.out_spec is not None
    inputs = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in program.graph_signature.user_inputs]
    given = tree_leaves((tuple(args), dict(kwargs)))
    leaves = tuple(_leaf(node.meta.get("val"), value) for node, value in zip(inputs, given, strict=True))
    limits = {str(size): (float(r.lower), float(r.upper)) for size, r in program.range_constraints.items()}
    return Exported(fx.GraphModule(module, graph), *program.call_spec, leaves, limits, guards)


def _leaf(value: Any, given: Any) -> Any:
    if not isinstance(given, Tensor):
        return given
    return (given.dtype, given.device.type, *(size if isinstance(size, int) else str(size) for size in value.shape))


def _name_layers(graph: fx.Graph) -> None:
    """Call products by the layers whose weights they read."""
    for node in graph.nodes:
        weight = node.args[1] if len(node.args) > 1 and name_of(node) in ("linear", "conv1d", "conv2d") else None
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            node._rename(str(weight.target).rpartition(".")[0].replace(".", "_"))


class Whole(nn.Module):
    """Mixin: a module that runs a graph of itself where that holds, and otherwise its code."""

    _exported: Exported
    _shown: tuple[nn.Module, ...]  # whose code the graph stands for


@functools.cache
def _whole_class(base: type[nn.Module]) -> Any:
    @functools.wraps(base.forward)
    def forward(self: Whole, *args: Any, **kwargs: Any) -> Any:
        graph = self._exported
        given = None if torch.compiler.is_compiling() or any(map(has_hooks, self._shown)) else graph.flat(args, kwargs)
        if given is None:
            return base.forward(self, *args, **kwargs)
        return tree_unflatten(list(self.whole(*given)), graph.outputs)

    def reduce(self: Whole) -> tuple[Any, ...]:
        return _new_whole, (base,), vars(self)

    return type(base.__name__, (Whole, base), {"forward": forward, "__reduce__": reduce, "__doc__": base.__doc__, "__module__": base.__module__})


def _new_whole(base: type[nn.Module]) -> Whole:
    return nn.Module.__new__(_whole_class(base))


def attach_(model: nn.Module, graph: Exported) -> None:
    """Make a model run a graph of itself where that holds, in place."""
    model.__class__ = _whole_class(type(model))
    vars(model)["_shown"] = tuple(module for module in model.modules() if not isinstance(module, Segment))
    model.add_module("whole", graph.module)
    vars(model)["_exported"] = graph
