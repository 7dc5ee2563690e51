"""Recorder: the aten operations of a forward pass, with the node, the module and the weights that each belongs to.

A dispatch mode sees every operation of every kind of model: captured or not, opaque functions included. Weights are
recognised by their storage.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from passes.captured import Captured


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


class Recorder(TorchDispatchMode):
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

    def __init__(self, recorder: Recorder, path: str, module: Captured) -> None:
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
