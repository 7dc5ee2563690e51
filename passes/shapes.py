"""Shapes: what a model computes on inputs of a given shape, found on the meta device without data where that is possible.

A copy of the model's structure runs on meta tensors under a dispatch mode, which sees every aten operation of every kind
of model: captured or not, opaque functions included. The model itself, its hooks, buffers and generators are not touched.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from passes.captured import Captured
from passes.effects import preserve_rng
from passes.masking import Mask


@dataclass(frozen=True)
class Operation:
    """One aten operation of one forward pass."""

    name: str  # "aten.convolution"
    args: tuple[Any, ...]  # with every tensor replaced by its shape, a torch.Size
    outputs: tuple[torch.Size, ...]
    weights: tuple[str | None, ...]  # the parameter name of each argument that is a weight, or a view of one
    module: str  # path of the innermost module that was running
    node: str  # name of the fx node that was running, "" outside captured regions
    region: str = ""  # path of that node's region


@dataclass(frozen=True)
class Record:
    """The operations of one forward pass, in order."""

    operations: list[Operation]
    measured: bool  # whether the pass ran on the example data itself, because shapes depend on it


def record(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Record:
    """List the operations of one forward pass in evaluation mode, from shapes alone wherever that is possible.

    Where shapes depend on data (the boxes that a detector keeps), the pass runs on the inputs themselves, if they are real.

    Args:
        model: any module, on any device.
        args: the positional arguments of forward.
        kwargs: the keyword arguments of forward.

    Returns:
        The operations, and whether they were measured on data.

    Raises:
        ValueError: the inputs do not fit, the message naming the node and the module that refused them; or shapes depend
            on data and there is none.

    Example:
        >>> [op.name for op in record(nn.Linear(2, 3), (torch.empty(1, 2),)).operations]
        ['aten.t', 'aten.addmm']
    """
    inputs = (tuple(args), dict(kwargs or {}))
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    recorder = _Recorder()
    try:
        empty = pytree.tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), inputs)
        _run(_shadow(model, meta=True), recorder, empty)
        return Record(recorder.operations, measured=False)
    except Exception as error:
        failure: Exception = error
    real = not any(t.is_meta for t in [*tensors, *model.parameters(), *model.buffers()])
    if real:
        recorder = _Recorder()
        try:
            _run(_shadow(model, meta=False), recorder, pytree.tree_map_only(Tensor, Tensor.clone, inputs))
            return Record(recorder.operations, measured=True)
        except Exception as error:
            failure = error
    shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
    reason = str(failure).partition("\n")[0]
    if not real and _needs_data(failure):
        raise ValueError(
            f"What the model computes depends on data, at {recorder.where()} ({reason}). Give example inputs with values, "
            f"such as torch.rand(...), and a model that is not on the meta device."
        ) from failure
    raise ValueError(f"Inputs of shape {shapes} do not fit the model, at {recorder.where()}: {reason}") from failure


def _needs_data(error: Exception) -> bool:
    """Tell whether an operation failed because meta tensors have no values: torch has no one exception for it."""
    phrases = (
        "meta tensor",
        "meta backend",
        "'Meta'",
        "data-dependent",
        "data dependent",
        "data-independent",
        "meta device",
    )
    return any(phrase in str(error) for phrase in phrases)


def _run(shadow: nn.Module, recorder: "_Recorder", inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    recorder.know(shadow)
    recorder.watch(shadow)
    args, kwargs = inputs
    with preserve_rng(), torch.enable_grad(), recorder:  # with gradients, attention does not take its opaque fast path
        shadow(*args, **kwargs)


def _shadow(model: nn.Module, meta: bool) -> nn.Module:
    """Copy a model's structure, in evaluation mode and without hooks; tied weights stay tied.

    On the meta device, or around the model's own parameters. Masks return what they get: weights are kept masked, and the
    weight behind them stays recognisable.
    """
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(_empty(p), p.is_floating_point()) if meta else p
    for b in model.buffers():
        memo[id(b)] = _empty(b) if meta else b.clone()
    for module in model.modules():
        memo |= {
            id(v): type(v)() for k, v in vars(module).items() if k.endswith("_hooks") or (isinstance(v, dict) and not v)
        }
        if isinstance(module, Mask):
            memo[id(module)] = _Unmasked()
        elif isinstance(module, Captured):
            memo |= {id(graph): graph for graph in module._graphs.values()}  # which are only read
    shadow = copy.deepcopy(model, memo)
    for module in shadow.modules():
        vars(module)["training"] = False
    return shadow


def _empty(tensor: Tensor) -> Tensor:
    # `empty_like` of a tensor that is on meta already takes ten times as long.
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


class _Unmasked(nn.Module):
    """Stands for a mask."""

    def forward(self, weight: Tensor, transformed: bool = False) -> Tensor:
        """Return the weight as it is."""
        return weight


class _Recorder(TorchDispatchMode):
    """Records operations together with the module, the node and the weights they belong to."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._owners: dict[int, str] = {}  # storage: name of the parameter whose elements it holds, perhaps transformed
        self._static: dict[int, Tensor] = {}  # storage: parameters, buffers, and what is computed from them alone
        self._sizes: dict[str, int] = {}
        self._modules, self._nodes = [""], [("", "")]

    def know(self, model: nn.Module) -> None:
        """Recognise the parameters and buffers of `model` wherever they are read."""
        self._static = {_storage(t): t for t in (*model.parameters(), *model.buffers())}
        weights = {name: p for name, p in model.named_parameters() if p.dim() >= 2}  # an addmm's bias is not its weight
        self._owners = {_storage(p): name for name, p in weights.items()}
        self._sizes = {name: p.numel() for name, p in weights.items()}

    def watch(self, model: nn.Module) -> None:
        """Follow which module and which node of `model` runs."""
        for path, module in model.named_modules():
            module.register_forward_pre_hook(lambda m, args, path=path: self._modules.append(path))
            module.register_forward_hook(lambda m, args, out: self._modules.pop() and None)
            if isinstance(module, Captured):
                interpreter = _Interpreter(self, path, module)
                vars(module)["_forwards"] = {False: interpreter.forward}

    @contextmanager
    def at(self, region: str, node: str) -> Iterator[None]:
        """Name the node whose operations follow."""
        self._nodes.append((region, node))
        yield  # not in a finally: after an error, `where` reads the place from here
        self._nodes.pop()

    def where(self) -> str:
        """Say which node and module was running."""
        node, module = self._nodes[-1][1], self._modules[-1]
        places = [f"node {node!r}"] * bool(node) + [f"module {module!r}"] * bool(module)
        return ", ".join(places) or "its forward"

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = _batch_norm(*args) if func in _BATCH_NORMS and args[0].is_meta else func(*args, **(kwargs or {}))
        outputs = [output] if isinstance(output, Tensor) else output if isinstance(output, (tuple, list)) else []
        tensors = [t for a in args for t in (a if isinstance(a, (tuple, list)) else (a,)) if isinstance(t, Tensor)]
        if tensors and all(_storage(t) in self._static for t in tensors):
            self._follow(str(func._overloadpacket), tensors, [o for o in outputs if isinstance(o, Tensor)])
        region, node = self._nodes[-1]
        self.operations.append(
            Operation(
                str(func._overloadpacket),
                tuple(_shape(a) for a in args),
                tuple(o.shape for o in outputs if isinstance(o, Tensor)),
                tuple(self._owners.get(_storage(a)) if isinstance(a, Tensor) else None for a in args),
                self._modules[-1],
                node,
                region,
            )
        )
        return output

    def _follow(self, op: str, tensors: list[Tensor], outputs: list[Tensor]) -> None:
        """Recognise what was computed from parameters alone; one as large as a weight is that weight, transformed."""
        sources = [owner for t in tensors if (owner := self._owners.get(_storage(t)))]
        for output in outputs:
            if _storage(output) not in self._static:
                self._static[_storage(output)] = output  # kept, so that no later tensor gets its storage
                own = [name for name in sources if self._sizes[name] == output.numel()]
                if own and op not in _TABLES:
                    self._owners[_storage(output)] = own[0]


# What reads a parameter as a table, whose rows are no weight (`passes.operands` goes by the same rule).
_TABLES = frozenset(["aten.index", "aten.index_select", "aten.gather", "aten.embedding", "aten.take"])


class _Interpreter(fx.Interpreter):
    """Runs a graph and tells the recorder which node it is at."""

    def __init__(self, recorder: _Recorder, path: str, module: Captured) -> None:
        super().__init__(module)
        self.recorder, self.path, self.signature = recorder, path, module._forwards[False]

    def forward(self, _: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the graph on what its generated code would take."""
        bound = inspect.signature(self.signature).bind(None, *args, **kwargs)
        return self.run(*list(bound.arguments.values())[1:])

    def run_node(self, n: fx.Node) -> Any:
        with self.recorder.at(self.path, n.name):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return getattr(self, n.op)(n.target, _thawed(args), _thawed(kwargs))


def _thawed(value: Any) -> Any:
    """Return fx's immutable containers as plain ones, which generated code passes and functions may write to."""
    if isinstance(value, dict):
        return {k: _thawed(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        kind = tuple if isinstance(value, tuple) else list
        return kind(_thawed(v) for v in value)
    return value


_BATCH_NORMS = (torch.ops.aten.native_batch_norm.default, torch.ops.aten._native_batch_norm_legit_no_training.default)


def _batch_norm(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    # torch's own shape rule decomposes the operation, at 2 ms each: more than everything else together.
    return torch.empty_like(x), x.new_empty(0), x.new_empty(0)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape
    return tuple(_shape(v) for v in value) if isinstance(value, (list, tuple)) else value
