"""Tracer: what one graph shows and what it calls whole.

fx is silently wrong on more than it refuses: optional arguments, random numbers, Python state, modes, questions about a value.
What cannot be traced faithfully stays a call, of a module or of a function.
"""

import collections
import dataclasses
import inspect
import itertools
import operator
import traceback
from collections.abc import Callable, Container, Iterable
from typing import Any, NoReturn

from torch import Size, Tensor, fx, nn, strided

from passes.capture.arguments import is_default
from passes.capture.asking import RecomputingError, changed_mode, modes, recomputing_refused, traced_by
from passes.capture.effects import Snapshot
from passes.capture.frames import is_compared_by_identity, is_users, matches_classes, module_of, module_of_code, user_frame
from passes.capture.kinds import Kinds, returns_tensor
from passes.capture.leaves import has_hooks, is_builtin, is_called_whole
from passes.capture.proxies import Attribute, CannotTraceError, Value
from passes.torch_ops import is_view

_CONTAINERS = (tuple, list, dict, slice, range)
_SIMPLE = frozenset([Value, Attribute, bool, int, float, str, type(None), tuple, list, dict])


def expect_default(value: Any, default: Any, name: str) -> None:
    """Raise unless an optional argument of `forward` has the value that it was traced with."""
    if not is_default(value, default):
        raise ValueError(
            f"This graph holds the case {name}={default!r}, the default, and no other. Call the model itself, which runs its "
            f"own code for other arguments."
        )


fx.wrap("expect_default")


class TypedTracer(fx.Tracer):
    """Traces results and arguments into nodes that make what they were: a dict of another type does not become a plain one."""

    proxy_buffer_attributes = True  # a buffer is read when the graph runs, not when it is traced

    def create_arg(self, a: Any) -> Any:
        """Return what stands for an argument in a node."""
        kind = type(a)
        if kind in _SIMPLE:  # most of what there is
            return super().create_arg(a)
        if kind is collections.OrderedDict:
            return self.create_node("call_function", kind, (self.create_arg(dict(a)),), {})
        if dataclasses.is_dataclass(a) or (issubclass(kind, _CONTAINERS) and not _is_plain(kind)):
            self.refuse(f"makes a {kind.__name__}, and a graph holds plain containers only")
        return super().create_arg(a)

    def refuse(self, what: str) -> NoReturn:
        """Raise because traced code does what a graph cannot hold."""
        raise CannotTraceError(f"it {what}")


def _is_plain(kind: type) -> bool:
    """Whether fx keeps the type of a container: its own, torch.Size, and named tuples."""
    return kind.__module__ in ("builtins", "torch.fx.immutable_collections") or kind is Size or hasattr(kind, "_fields")


class Tracer(TypedTracer):
    """Traces with optional arguments at their defaults; calls whole what it cannot trace faithfully.

    Args:
        state: a snapshot of the module that is traced, from before.
        called: Python functions that the graph calls as they are.
        blocks: modules that a graph calls whole because the user asked for it.
        careful: whether to compare the state after every module, which finds the one that changes it.

    Attributes:
        refused: the Python functions that cannot be traced into.
        assumed: the arguments of forward that the graph takes for tensors.
        through: paths of the modules that were traced through.
    """

    def __init__(
        self,
        state: Snapshot,
        called: Iterable[Callable[..., Any]] = (),
        blocks: Container[nn.Module] = (),
        careful: bool = False,
    ) -> None:
        super().__init__(autowrap_functions=tuple(called))
        self.state, self.blocks, self.careful = state, blocks, careful
        self.refused: set[Callable[..., Any]] = set()
        self.assumed: set[str] = set()
        self.through: set[str] = set()
        self._refusals: list[CannotTraceError] = []
        self._certain = False  # whether the next value is known to be a tensor
        self._leaves: dict[nn.Module, bool] = {}
        self._kinds: Kinds | None = None

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace, and refuse what recomputes activations."""
        self._modes = modes()
        with recomputing_refused(), traced_by(self):
            graph = super().trace(root, concrete_args)
        if self._refusals:  # which the code itself has caught
            raise self._refusals[0]
        return graph

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and not any(a is b for b in self.root.buffers()):
            own = [t for t in (*self.root.parameters(), *self.root.buffers()) if t.layout is a.layout is strided]
            if a.requires_grad or any(a.untyped_storage()._cdata == t.untyped_storage()._cdata for t in own):
                self.refuse("computes with parameters or buffers that it does not read as attributes")
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m not in self._leaves:
            self._leaves[m] = is_builtin(m) or is_called_whole(m) or m in self.blocks
        return self._leaves[m]

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.path_of_module(m)
        inside = self._gets_parameter(m, args, kwargs)
        if self.is_leaf_module(m, path) and not inside:
            _check_call(m, args, kwargs)
            self._certain = returns_tensor(m)
            return super().call_module(m, forward, args, kwargs)
        last, refusals = next(iter(reversed(self.graph.nodes)), None), len(self._refusals)
        try:
            result = forward(*args, **kwargs) if inside else super().call_module(m, forward, args, kwargs)
            if len(self._refusals) == refusals and not (self.careful and self.state.difference(m)):
                self.through.add(path)
                return result
        except Exception as error:  # anything, raised by user code on a proxy: `trace` goes on inside and says why
            _check_call(m, args, kwargs)
            self.refused |= failing_function(error)
        del self._refusals[refusals:]
        self.state.restore(m)
        self._erase_after(last)
        return self.create_proxy("call_module", path, args, kwargs)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **options: Any) -> fx.Node:
        if (now := modes()) != self._modes:
            self.refuse(f"computes with {changed_mode(self._modes, now)} changed")
        return super().create_node(kind, target, args, kwargs, *more, **options)

    def proxy(self, node: fx.Node) -> Value:
        """Return what stands for a node's value; refuse where code compares it to None, which no proxy can be."""
        certain, self._certain = self._certain, False
        frame = user_frame()
        if frame and matches_classes(frame.f_code):
            self.refuse("matches values against classes")
        if not certain and _may_be_none(node) and frame and is_compared_by_identity(frame):
            value = Value(node, self)
            if self.known_kind_of(value) is None:
                self.refuse(f"asks whether {node.name!r} is None")
            return value
        return Value(node, self)

    def known_kind_of(self, value: Value) -> type | None:
        """Return the class of what a proxy stands for, None where it is not known."""
        if self._kinds is None:
            self._kinds = Kinds(self.root, self.graph)
        kind = self._kinds.of(value.node)
        self.assumed |= kind.assumed
        return kind.cls

    def kind_of(self, value: Value) -> type:
        """Return the class of what a proxy stands for, or refuse."""
        kind = self.known_kind_of(value)
        return kind or self.refuse(f"asks what kind of value {value.node.name!r} is")

    def refuse(self, what: str) -> NoReturn:
        """Raise, and remember it, since the code that is traced may catch the exception."""
        self._refusals.append(CannotTraceError(f"it {what}"))
        raise self._refusals[-1]

    def to_bool(self, obj: fx.Proxy) -> bool:
        return self.refuse("branches on the value of a tensor")

    def iter(self, obj: fx.Proxy) -> Any:
        return self.refuse("iterates over a tensor")

    def _gets_parameter(self, m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a user's module without parameters is given one: it may be a product made a module."""
        nodes = [value.node for value in (*args, *kwargs.values()) if isinstance(value, fx.Proxy)]
        for i, node in enumerate(nodes):
            while is_view(node):
                node = nodes[i] = node.all_input_nodes[0]
        return any(node.op == "get_attr" for node in nodes) and not (is_builtin(m) or has_hooks(m))

    def _erase_after(self, last: fx.Node | None) -> None:
        while (node := next(iter(reversed(self.graph.nodes)), None)) is not last and node is not None:
            self.graph.erase_node(node)

    def _proxy_placeholder(self, name: str, concrete_args: Any, sig: inspect.Signature, fn_for_analysis: Any) -> Any:
        proxy = super()._proxy_placeholder(name, concrete_args, sig, fn_for_analysis)
        parameter = sig.parameters.get(name)
        if parameter is None or parameter.default is inspect.Parameter.empty:
            return proxy
        guard = self.create_proxy("call_function", expect_default, (proxy, parameter.default, name), {})
        guard.node.meta["is_wrapped"] = True  # generated code must keep the call when it is traced again
        return parameter.default


def _check_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise the TypeError that a call with arguments of other names would raise, which the caller's code may wait for."""
    if kwargs:
        inspect.signature(module.forward).bind(*args, **kwargs)


def _may_be_none(node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in (operator.getitem, getattr) or is_users(getattr(node.target, "__module__", None) or "torch")
    return node.op == "call_module"


def failing_function(error: Exception) -> set[Callable[..., Any]]:
    """Find the function that a module's forward called and that raised; an empty set if the forward itself did.

    One that recomputes activations of the module's layers would hide them in a call: there it is the forward, too.
    """
    if isinstance(error, RecomputingError):
        return set()
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if is_users(module_of(frame))]
    for caller, callee in itertools.pairwise(frames):
        function: Any = caller.f_globals.get(callee.f_code.co_name)
        if inspect.isfunction(function) and module_of_code(function) == "torch.fx._symbolic_trace":
            function = inspect.unwrap(function)  # which is called whole already, where it is given what stands for a tensor
        user = inspect.isfunction(function) and is_users(function.__module__) and "self" in caller.f_locals
        if user and inspect.unwrap(function).__code__ is callee.f_code:
            return {function}
    return set()
