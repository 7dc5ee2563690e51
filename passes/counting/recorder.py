"""Recorder: the aten operations of a forward pass, with the node, the module and the weights that each belongs to.

A dispatch mode sees every operation of every kind of model: captured or not, opaque functions included. Weights are
recognised by their storage.
"""

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils._python_dispatch import TorchDispatchMode

from passes.capture.captured import Captured


@dataclass(frozen=True)
class Operation:
    """One aten operation of one forward pass."""

    name: str  # "aten.convolution"
    args: tuple[Any, ...]  # with every tensor replaced by its shape, a torch.Size
    outputs: tuple[torch.Size, ...]
    weights: tuple[tuple[str, ...], ...]  # of each argument, the parameters that it is, or is put together of
    module: str  # path of the innermost module that was running
    node: str  # name of the fx node that was running, "" outside captured regions
    region: str = ""  # path of that node's region
    unmasked: tuple[str, ...] = ()  # masked parameters among its arguments that did not come through their mask


class Recorder(TorchDispatchMode):
    """Records operations together with the module, the node and the weights they belong to."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._owners: dict[int, tuple[str, ...]] = {}  # storage: the parameters whose elements it holds, perhaps transformed
        self._static: dict[int, Tensor] = {}  # storage: parameters, buffers, and what is computed from them alone
        self._raw: set[int] = set()  # storages of masked parameters, as they are without their mask
        self._sizes: dict[str, int] = {}
        self._stacks: set[str] = set()  # parameters of three or more dimensions, which may be matrices to choose from
        self._modules, self._nodes = [""], [("", "")]

    def know(self, model: nn.Module, masked: Collection[str] = ()) -> None:
        """Recognise the parameters and buffers of `model` wherever they are read, those of them that are masked, too."""
        self._static = {_storage(t): t for t in (*model.parameters(), *model.buffers())}
        weights = {name: p for name, p in model.named_parameters() if p.dim() >= 2}  # an addmm's bias is not its weight
        self._owners = {_storage(p): (name,) for name, p in weights.items()}
        self._sizes = {name: p.numel() for name, p in weights.items()}
        self._stacks = {name for name, p in weights.items() if p.dim() >= 3}
        self._raw = {_storage(p) for name, p in weights.items() if name in masked}

    def through_mask(self, weight: Tensor) -> Tensor:
        """Return a weight as its mask would, as a tensor of its own, so that reading past the mask can be told."""
        masked, name = weight.clone(), self._owners.get(_storage(weight))
        self._static[_storage(masked)] = masked
        if name:
            self._owners[_storage(masked)] = name
        return masked

    def watch(self, model: nn.Module) -> None:
        """Follow which module and which node of `model` runs."""
        for module in model.modules():
            if isinstance(module, Captured):
                module.ignore_later_hooks()
        for path, module in model.named_modules():
            module.register_forward_pre_hook(lambda m, args, path=path: self._modules.append(path), prepend=True)
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
        outputs = [o for o in outputs if isinstance(o, Tensor)]
        tensors = [t for a in args for t in (a if isinstance(a, (tuple, list)) else (a,)) if isinstance(t, Tensor)]
        name = str(func._overloadpacket)
        if tensors and all(_storage(t) in self._static for t in tensors):
            self._follow(name, tensors, outputs)
        region, node = self._nodes[-1]
        weights = tuple(self._owners.get(_storage(a), ()) if isinstance(a, Tensor) else () for a in args)
        raw = [w for a, w in zip(args, weights, strict=True) if w and _storage(a) in self._raw]
        self.operations.append(
            Operation(
                name,
                tuple(_shape(a) for a in args),
                tuple(o.shape for o in outputs),
                weights,
                self._modules[-1],
                node,
                region,
                tuple(n for names in raw for n in names),
            )
        )
        return output

    def _follow(self, op: str, tensors: list[Tensor], outputs: list[Tensor]) -> None:
        """Recognise what was computed from parameters alone."""
        sources = [owners for t in tensors if (owners := self._owners.get(_storage(t)))]
        for output in outputs:
            if _storage(output) not in self._static:
                self._static[_storage(output)] = output  # kept, so that no later tensor gets its storage
                if owners := self._owners_of(op, sources, output.numel()):
                    self._owners[_storage(output)] = owners

    def _owners_of(self, op: str, sources: list[tuple[str, ...]], size: int) -> tuple[str, ...]:
        """List the parameters that a value is made of: a value as large as a parameter is that parameter, transformed."""
        names = tuple(dict.fromkeys(name for owners in sources for name in owners))
        if op in _JOINING:
            return names
        if op in _TABLES:  # rows are not weights, but matrices chosen from a stack are
            return names if names and all(name in self._stacks for name in names) else ()
        if op in _PRODUCTS and len(names) > 1:  # what a parameter times a weight is, is an activation
            return ()
        return next((o for o in sources if sum(self._sizes[name] for name in o) == size), ())


_TABLES = frozenset(["aten.index", "aten.index_select", "aten.gather", "aten.embedding", "aten.take"])
_JOINING = frozenset(["aten.cat", "aten.stack", "aten.hstack", "aten.vstack"])
_PRODUCTS = frozenset(["aten.mm", "aten.bmm", "aten.addmm", "aten.baddbmm", "aten.convolution", "aten.mv", "aten.dot"])


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
            return getattr(self, n.op)(n.target, thawed(args), thawed(kwargs))


def thawed(value: Any) -> Any:
    """Return fx's immutable containers as plain ones, which generated code passes and functions may write to."""
    if isinstance(value, immutable_dict):
        return {k: thawed(v) for k, v in value.items()}
    if isinstance(value, immutable_list) or type(value) is tuple:  # and no named one, such as torch.topk returns
        return (list if isinstance(value, list) else tuple)(thawed(v) for v in value)
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
