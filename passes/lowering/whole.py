"""Whole: one graph of a model whose Python code fx cannot trace, by torch.export, for calls like the one that is given.

The code of a transformer asks about optional arguments, sizes and settings; `passes.capture` leaves it as it is, and makes
graphs of what lies inside. Who lowers a model says how it is called. Calls of another kind run the code, as before.
"""

import functools
import inspect
import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection, export
from torch.export.graph_signature import InputKind
from torch.fx.graph import CodeGen
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from passes.capture.copies import hooks_of
from passes.capture.effects import Snapshot
from passes.capture.leaves import has_hooks
from passes.lowering.segment import Segment
from passes.torch_ops import name_of


@dataclass(frozen=True)
class Exported:
    """A graph of flat inputs and outputs.

    Attributes:
        module: a GraphModule that runs it.
        names: of keyword arguments, in order.
        inputs, outputs: how arguments and results are put together.
        leaves: of each flat input, its number format, device and sizes, numbers or names; or the value that it must have.
        limits: the least and the largest of the sizes with names.
        guards: what the graph assumes of them besides.
    """

    module: fx.GraphModule
    names: tuple[str, ...]
    inputs: TreeSpec
    outputs: TreeSpec
    leaves: tuple[Any, ...]
    limits: dict[str, tuple[float, float]]
    guards: tuple[Any, ...]  # of sympy
    _known: dict[tuple[int, ...], bool] = field(default_factory=dict, compare=False)

    def flat(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any] | None:
        """Return the inputs of the graph for a call, None where it does not hold for it."""
        if kwargs.keys() != {*self.names}:
            return None
        found, spec = tree_flatten((tuple(args), {name: kwargs[name] for name in self.names}))
        sizes: dict[str, int] = {}
        if spec != self.inputs or not all(_is_like(x, leaf, sizes) for x, leaf in zip(found, self.leaves, strict=True)):
            return None
        key = tuple(sizes.values())
        if key not in self._known:
            self._known[key] = self._hold(sizes)
        return found if self._known[key] else None

    def _hold(self, sizes: Mapping[str, int]) -> bool:
        inside = all(
            self.limits[name][0] <= size <= self.limits[name][1] for name, size in sizes.items() if name in self.limits
        )
        try:
            return inside and all(
                bool(guard.subs({symbol: sizes[str(symbol)] for symbol in guard.free_symbols})) for guard in self.guards
            )
        except (KeyError, TypeError):  # it assumes something of sizes that are not among those of inputs
            return False


def _is_like(value: Any, leaf: Any, sizes: dict[str, int]) -> bool:
    if not isinstance(leaf, tuple):
        return value is leaf or (type(value) is type(leaf) and not isinstance(value, Tensor) and bool(value == leaf))
    kind, device, *of = leaf
    if not isinstance(value, Tensor) or (value.dtype, value.device.type, value.dim()) != (kind, device, len(of)):
        return False
    known = [
        sizes.setdefault(name, size) if isinstance(name, str) else name for name, size in zip(of, value.shape, strict=True)
    ]
    return known == list(value.shape)


def exported(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Exported | None:
    """Return a graph of a model in evaluation mode for calls like this one, None where there is none that can be trusted.

    Args:
        model: whose weights the graph shares.
        args: positional arguments.
        kwargs: keyword arguments.
    """
    if any(map(has_hooks, model.modules())):
        return None
    places = [*inspect.signature(model.forward).parameters, *sorted(kwargs)]
    names = tuple(sorted(kwargs, key=places.index))
    args, kwargs = tuple(args), {name: kwargs[name] for name in names}  # as torch.export orders them
    given, inputs = tree_flatten((args, kwargs))
    state = Snapshot(model.modules(), hooks_of(model))
    with torch.no_grad():
        model(*args, **kwargs)
    if state.difference():  # a graph would write it once
        state.restore()
        return None
    program = _program(model, args, kwargs, 2) or _program(model, args, kwargs, 0)
    state.restore()  # torch.export puts copies of attributes in their places
    if program is None:
        return None
    module: Any = program.module()
    signature, outputs = program.graph_signature, program.call_spec.out_spec
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate or outputs is None or program.call_spec.in_spec != inputs:
        return None
    graph = module.graph
    for node in [n for n in graph.nodes if n.op == "call_module"]:  # torch's check of what is in `guards`, where it has one
        graph.erase_node(node)
    graph.set_codegen(CodeGen())
    graph._tracer_cls = fx.Tracer  # of torch.export's own no file can be read again
    _name_layers(graph)
    leaf_names = [spec.arg.name for spec in signature.input_specs if spec.kind is InputKind.USER_INPUT]
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    leaves = tuple(_leaf(values[name], value) for name, value in zip(leaf_names, given, strict=True))
    limits = {str(size): (float(r.lower), float(r.upper)) for size, r in program.range_constraints.items()}
    tensors = [value for value in values.values() if isinstance(value, Tensor)]
    environment: Any = next((size.node.shape_env for x in tensors for size in x.shape if not isinstance(size, int)), None)
    guards = tuple(guard.expr.subs(environment.replacements) for guard in environment.guards) if environment else ()
    found = Exported(fx.GraphModule(module, graph), names, inputs, outputs, leaves, limits, guards)
    return found if _agrees(model, found, args, kwargs) else None


@torch.no_grad()
def _agrees(model: nn.Module, graph: Exported, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a graph computes what the model does: some code does something else while it is exported."""

    def other(x: Tensor) -> Tensor:
        return x.roll(1, -1).flip(0) if x.dim() else x

    for change in (lambda x: x, other):
        flat = graph.flat(own := tree_map_only(Tensor, change, args), named := tree_map_only(Tensor, change, kwargs))
        try:
            expected = model(*own, **named)
        except Exception:  # other values may mean something that these sizes do not allow
            return False
        found = [] if flat is None else graph.module(*flat)
        for a, b in itertools.zip_longest(tree_leaves(expected), found):
            if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype:
                scale = a.double().nan_to_num(0, 0, 0).abs().amax() if a.numel() else 0
                if not torch.allclose(a.double(), b.double(), rtol=0, atol=1e-4 * float(scale), equal_nan=True):
                    return False
            elif a is not b and a != b:
                return False
    return True


def _program(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], vary: int) -> ExportedProgram | None:
    """Export a model, for any sizes of the first dimensions of its inputs: so many, batches and tokens, and of images one."""
    sizes = ShapesCollection()
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):  # torch.export keeps a size of 1, and what depends on the size of an image takes it long
            first = leaf.shape[: min(vary, 1) if leaf.dim() > 3 else vary]
            sizes[leaf] = {dim: Dim.AUTO for dim, size in enumerate(first) if size > 1}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return export(model, args, kwargs, dynamic_shapes=sizes, strict=False)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # whatever torch.export and the model's code raise: the code stays as it is
        return None


def _leaf(value: Any, given: Any) -> Any:
    if not isinstance(given, Tensor):
        return given
    sizes = [str(size) for size in value.shape]  # those that do not vary may be symbols too
    return (given.dtype, given.device.type, *(int(size) if size.isdigit() else size for size in sizes))


def _name_layers(graph: fx.Graph) -> None:
    """Call products by the layers whose weights they read."""
    for node in graph.nodes:
        weight = node.args[1] if len(node.args) > 1 and name_of(node) in ("linear", "conv1d", "conv2d") else None
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            node._rename(str(weight.target).rpartition(".")[0].replace(".", "_"))


class Whole(nn.Module):
    """Mixin: a module that runs a graph of itself where that holds, and otherwise its code."""

    _exported: Exported
    _shown: tuple[nn.Module, ...]  # the modules inside whose code the graph stands for


@functools.cache
def _whole_class(base: type[nn.Module]) -> Any:
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = torch.compiler.is_compiling() or any(map(has_hooks, self._shown))
        given = None if hidden else self._exported.flat(args, kwargs)
        if given is None:
            return base.forward(self, *args, **kwargs)
        return tree_unflatten(list(self._whole(*given)), self._exported.outputs)

    def reduce(self: Any) -> tuple[Any, ...]:
        plain = nn.Module.__new__(base)
        vars(plain).update(vars(self))
        return _as_whole, (plain,)

    own = {"forward": forward, "__reduce__": reduce, "__doc__": base.__doc__, "__module__": base.__module__}
    return type(base.__name__, (Whole, base), own)


def _as_whole(model: nn.Module) -> nn.Module:
    model.__class__ = _whole_class(type(model))
    return model


def attach_(model: nn.Module, graph: Exported) -> None:
    """Make a model run a graph of itself where that holds, in place."""
    shown = tuple(module for module in model.modules() if module is not model and not isinstance(module, Segment))
    _as_whole(model).add_module("_whole", graph.module)
    vars(model).update(_exported=graph, _shown=shown)
