"""Capture: what comes out of `sparsify` at density 1 is the model, on code that fx sees wrongly.

Every table is one kind of code. A case passes if outputs, their types, gradients and what the model remembers are those of the
original, in both modes and in several calls.
"""

import collections
import contextlib
import copy
import dataclasses
import functools
import pickle
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled, nn
from torch.utils import _pytree as pytree

from passes import install, trace
from passes.capture.lint import check_graphs
from sparsify import flop_report, fold, graphs, sparsify

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    """Two layers; the cases say what happens between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2)


def case(forward: Callable[..., Any], **attributes: Any) -> Callable[[], nn.Module]:
    """Make a class of two layers with this forward; attributes are called to be made, once for each model."""

    def init(self: nn.Module) -> None:
        Two.__init__(self)
        for name, make in attributes.items():
            setattr(self, name, make())

    name = forward.__name__
    return type(name, (Two,), {"__init__": init, "forward": forward, "__module__": __name__})


def python(x: Tensor) -> bool:
    """Keeps the module that asks out of every graph."""
    return bool(x.sum() > 1e9)


def leaves(value: Any) -> list[Any]:
    plain = dict(value) if isinstance(value, dict) else list(value) if isinstance(value, list) else value
    return pytree.tree_leaves(plain)


def run(model: nn.Module, args: Any, training: bool) -> tuple[Any, ...]:
    model.train(training).zero_grad()
    torch.manual_seed(3)
    with torch.set_grad_enabled(training):
        result = model(**args) if isinstance(args, dict) else model(*args)
    tensors = [t for t in leaves(result) if isinstance(t, Tensor)]
    loss = torch.stack([t.float().square().mean() for t in tensors]).sum()
    if loss.requires_grad:
        loss.backward()
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return type(result), [t.detach() for t in tensors], gradients


def assert_faithful(make: Callable[[], nn.Module], *args: Any, **options: Any) -> nn.Module:
    """Run a model and what sparsify makes of it at density 1: several calls, both modes."""
    torch.manual_seed(0)
    model = make()
    twin = copy.deepcopy(model)
    sparse = sparsify(model, 1.0, method="static", **options)
    given = args[0] if len(args) == 1 and isinstance(args[0], dict) else args or (X,)
    for training in (True, True, False, False, True):
        (kind, outs, grads), (kind2, outs2, grads2) = run(twin, given, training), run(sparse, given, training)
        assert kind2 is kind
        assert len(outs) == len(outs2) > 0
        for a, b in zip(outs, outs2, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=0)
        for name, gradient in grads.items():
            assert (gradient is None) == (grads2[name] is None), name
            if gradient is not None:
                torch.testing.assert_close(grads2[name], gradient)
    return sparse


# What decides how torch computes without being an argument.


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x  # no operation, so that only the backward pass is there to be lost

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


reverse = Reverse.apply


def reversed_(x: Tensor) -> Tensor:
    return Reverse.apply(x)


class ReverseLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return reverse(self.linear(x))


def function_by_another_name(self: Any, x: Tensor) -> Tensor:
    return self.b(reverse(self.a(x)))


def function_in_a_helper(self: Any, x: Tensor) -> Tensor:
    return self.b(reversed_(self.a(x)))


def function_in_a_child(self: Any, x: Tensor) -> Tensor:
    return self.b(self.child(self.a(x)))


def function_with_setup_context(self: Any, x: Tensor) -> Tensor:
    return self.b(Doubled.apply(self.a(x)))


def set_grad_enabled(self: Any, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(not self.training):
        x = self.a(x)
    return self.b(x)


def grad_switched_off_by_a_call(self: Any, x: Tensor) -> Tensor:
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)
    x = self.a(x)
    torch._C._set_grad_enabled(before)
    return self.b(x)


def enable_grad(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = self.a(x)
        with torch.enable_grad():
            return self.b(x)


def inference_mode(self: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        h = self.a(x)
    return self.b(h.clone())


@torch.no_grad()
def frozen_features(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x).relu()


def decorated_helper(self: Any, x: Tensor) -> Tensor:
    return self.b(frozen_features(self.a, x))


@torch.no_grad()
def decorated_forward(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x))


@torch.autocast("cpu", dtype=torch.bfloat16)
def decorated_autocast(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x))


def saved_tensors_hooks(self: Any, x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t):
        x = self.a(x)
    return self.b(x)


def asks_by_an_imported_name(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    return self.b(x if is_grad_enabled() else 2 * x)


def asks_for_inference_mode(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x) if torch.is_inference_mode_enabled() else 2 * self.a(x))


def asks_for_autocast(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    return self.b(x.bfloat16().float() if torch.is_autocast_enabled("cpu") else x)


MODES = {
    f.__name__: case(f)
    for f in (
        function_by_another_name,
        function_in_a_helper,
        function_with_setup_context,
        set_grad_enabled,
        grad_switched_off_by_a_call,
        enable_grad,
        inference_mode,
        decorated_helper,
        decorated_forward,
        decorated_autocast,
        saved_tensors_hooks,
        asks_by_an_imported_name,
        asks_for_inference_mode,
        asks_for_autocast,
    )
} | {"function_in_a_child": case(function_in_a_child, child=ReverseLayer)}


@pytest.mark.parametrize("name", MODES)
def test_modes_and_custom_functions(name: str) -> None:
    assert_faithful(MODES[name])


def test_what_is_asked_follows_the_caller() -> None:
    """A captured model answers anew in every call, which another mode may surround."""
    model = case(asks_for_autocast)()
    sparse = sparsify(model, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sparse(X), model(X))
    assert torch.equal(sparse(X), model(X))


# What a proxy pretends.


def asks_type(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x) * (2 if type(x) is Tensor else 3))


def asks_type_by_name(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x) * {"Tensor": 2}.get(type(x).__name__, 3))


def asks_whether_it_is_a_parameter(self: Any, x: Tensor) -> Tensor:
    kinds = [isinstance(self.a.weight, nn.Parameter), isinstance(self.a(x), nn.Parameter), isinstance(x, nn.Parameter)]
    return self.b(self.a(x)) * (4 * kinds[0] + 2 * kinds[1] + kinds[2])


def asks_for_kinds_of_shapes(self: Any, x: Tensor) -> Tensor:
    kinds = [
        isinstance(x.shape, tuple),
        isinstance(x.shape[0], int),
        isinstance(x.size(1), int),
        isinstance(x.dtype, int),
    ]
    return self.b(self.a(x)) * sum(2**i * kind for i, kind in enumerate(kinds))


def asks_a_result(self: Any, x: Tensor) -> Tensor:
    h = F.relu(self.a(x)) + x[0]
    return self.b(h * 2 if isinstance(h, (list, Tensor)) else h)


def asks_getattr(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) * getattr(x, "no_such_attribute", 5)


def asks_callable(self: Any, x: Tensor) -> Tensor:
    return self.b(x() if callable(x) else self.a(x))


def asks_hasattr_of_two(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) * (2 * hasattr(x, "shape") + hasattr(x, "keys"))


def asks_for_a_number_format(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) * (2 if isinstance(x, torch.FloatTensor) else 3)


def asks_inside_try(self: Any, x: Tensor) -> Tensor:
    try:
        big = bool(x.sum() > 1e9)
    except Exception:
        big = True
    return self.b(self.a(x) * (2 if big else 3))


def asks_for_length_inside_try(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    with contextlib.suppress(TypeError, RuntimeError):
        h = h * len(x)
    return self.b(h)


def sets_an_attribute(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    h.kept = 3
    return self.b(h) * h.kept


def writes_to_data(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        self.a.weight.data *= 0.5
    return self.b(self.a(x))


def asks_weights_of_attention(self: Any, x: Tensor) -> Tensor:
    out, weights = self.attention(x, x, x, need_weights=False)
    return self.b(self.a(out if weights is None else out * 2))


def asks_a_child_that_returns_none(self: Any, x: Tensor) -> Tensor:
    found = self.child(x)
    return self.b(self.a(x if found is None else found))


def asks_torch_jit(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) * (2 * torch.jit.isinstance(x, Tensor) + torch.jit.isinstance(x, list[Tensor]))


@functools.singledispatch
def doubled_or_not(value: Any) -> Any:
    return value


@doubled_or_not.register
def _(value: Tensor) -> Tensor:
    return value * 2


def dispatches_by_class(self: Any, x: Tensor) -> Tensor:
    return self.b(doubled_or_not(self.a(x)))


def matches_a_class(self: Any, x: Tensor) -> Tensor:
    match self.a(x):
        case Tensor() as h:
            return self.b(h)
        case other:
            return self.b(other * 2)


def matches_a_sequence(self: Any, x: Tensor) -> Tensor:
    match self.a(x).split(4, 1):
        case [first, second]:
            return self.b(torch.cat([second, first], 1))
        case parts:
            return self.b(torch.cat(list(parts), 1))


def tries_an_argument(self: Any, x: Tensor) -> Tensor:
    try:
        h = self.a(x, lengths=None)
    except TypeError:
        h = self.a(x) * 2
    return self.b(h)


def tries_an_argument_of_a_users_module(self: Any, x: Tensor) -> Tensor:
    try:
        h = self.child(x, lengths=None)
    except TypeError:
        h = self.child(x) * 2
    return self.b(h)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class MayReturnNone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor | None:
        return None if x.sum() < 1e9 else self.linear(x)


PRETENDING = {
    f.__name__: case(f)
    for f in (
        asks_type,
        asks_type_by_name,
        asks_whether_it_is_a_parameter,
        asks_for_kinds_of_shapes,
        asks_torch_jit,
        dispatches_by_class,
        matches_a_class,
        matches_a_sequence,
        tries_an_argument,
        asks_a_result,
        asks_getattr,
        asks_callable,
        asks_hasattr_of_two,
        asks_for_a_number_format,
        asks_inside_try,
        asks_for_length_inside_try,
        sets_an_attribute,
        writes_to_data,
    )
} | {
    "asks_weights_of_attention": case(asks_weights_of_attention, attention=lambda: nn.MultiheadAttention(8, 2)),
    "tries_an_argument_of_a_users_module": case(tries_an_argument_of_a_users_module, child=Own),
    "asks_a_child_that_returns_none": case(asks_a_child_that_returns_none, child=MayReturnNone),
}


@pytest.mark.parametrize("name", PRETENDING)
def test_proxies_answer_as_values_do(name: str) -> None:
    assert_faithful(PRETENDING[name])


@pytest.mark.parametrize("name", ["asks_type", "asks_for_kinds_of_shapes", "asks_a_result", "asks_getattr"])
def test_what_can_be_answered_stays_a_graph(name: str) -> None:
    assert list(graphs(sparsify(PRETENDING[name](), 0.5))) == [""]


# Arguments of another kind than a graph was traced with.


def takes_a_mask(self: Any, x: Tensor, mask: Any) -> Tensor:
    h = self.a(x)
    return self.b(h if mask is None else h * mask)


def takes_a_flag(self: Any, x: Tensor, mask: Any) -> Tensor:
    h = self.a(x)
    return self.b(h * 3 if mask is True else h)


def takes_a_string(self: Any, x: Tensor, mask: Any) -> Tensor:
    return self.b(F.relu(self.a(x))) if mask is None else self.b(self.a(x)) * len(str(mask))


def takes_tensors_or_lists(self: Any, x: Tensor, mask: Any) -> Tensor:
    h = self.a(x)
    return self.b(sum(h * m for m in mask) if isinstance(mask, list) else h * mask)


def takes_anything(self: Any, x: Any, mask: Any) -> Tensor:
    return self.b(self.a(x[0] if isinstance(x, (tuple, list)) else x))


def compares_its_arguments(self: Any, x: Tensor, mask: Any) -> Tensor:
    return self.b(self.a(x) + (0 if mask is x else 1))


def has_optional_arguments(self: Any, x: Tensor, mask: Any = None, *, scale: float = 2.0) -> Tensor:
    h = self.a(x)
    return self.b(h if mask is None else h * mask) * scale


ARGUMENTS: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "mask": (takes_a_mask, [(X, X), (X, None), (X, 2.0), {"x": X, "mask": None}, {"mask": X, "x": X}]),
    "flag": (takes_a_flag, [(X, True), (X, False), (X, X), {"x": X, "mask": True}]),
    "string": (takes_a_string, [(X, "same"), (X, None), (X, "")]),
    "list": (takes_tensors_or_lists, [(X, [X, X]), (X, X), (X, [2.0])]),
    "anything": (takes_anything, [(X, None), ([X, X], 1), ((X,), X)]),
    "same": (compares_its_arguments, [(X, X), (X, X.clone()), (X, None)]),
    "optional": (has_optional_arguments, [(X,), (X, X), {"x": X, "scale": 3.0}, {"x": X, "mask": None, "scale": 2.0}]),
}


@pytest.mark.parametrize("inside", [False, True], ids=["root", "child"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_another_kind(name: str, inside: bool) -> None:
    forward, calls = ARGUMENTS[name]
    for call in calls:
        if inside and isinstance(call, tuple):
            make = case(calls_a_child(call), child=case(forward))
            assert_faithful(make, X)
        else:
            assert_faithful(case(forward), call) if isinstance(call, dict) else assert_faithful(case(forward), *call)


def calls_a_child(call: tuple[Any, ...]) -> Callable[..., Any]:
    def outer(self: Any, x: Tensor) -> Tensor:
        return x if python(x) else self.child(*call) + self.b(self.a(x))

    return outer


def test_the_original_code_that_stands_in_is_masked() -> None:
    """Whatever the arguments, dropped weights have no part: here the weight is read by a function."""

    class Reads(Two):
        def forward(self, x: Tensor, mask: Any) -> Tensor:
            h = F.linear(x, self.a.weight, self.a.bias)
            return self.b(h if mask is None else h * mask)

    sparse = sparsify(Reads(), {"*": 0.3}, method="static")
    for mask in (X, None):
        sparse.zero_grad()
        sparse(X, mask).square().sum().backward()
        for name, kept in sparse.updater.masks.items():
            assert not sparse.get_parameter(name).grad[~kept].any()
    assert torch.equal(fold(sparse)(X, None), sparse(X, None))


# Results keep their type.


class Output(collections.OrderedDict):
    def __getattr__(self, name: str) -> Any:
        return self[name]


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Listed(list):
    pass


@dataclasses.dataclass
class Record:
    hidden: Tensor


RESULTS: dict[str, Callable[[Tensor], Any]] = {
    "OrderedDict": lambda h: collections.OrderedDict(z=h, a=h * 2),
    "nested": lambda h: {"x": [collections.OrderedDict(h=h)], "y": (h, Pair(h, h))},
    "own dict": lambda h: Output(hidden=h),
    "defaultdict": lambda h: collections.defaultdict(list, h=h),
    "list": lambda h: Listed([h, h]),
    "tuple": lambda h: (h, None, 3, "text"),
    "named tuple": lambda h: Pair(h, h * 2),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_keep_their_type(name: str) -> None:
    make = RESULTS[name]
    sparse = assert_faithful(case(lambda self, x: make(self.b(self.a(x)))))
    twin = copy.deepcopy(sparse)
    assert str(pytree.tree_structure(twin(X))) == str(pytree.tree_structure(sparse(X)))


class Ordered(Two):
    def forward(self, x: Tensor) -> Any:
        return collections.OrderedDict(out=self.b(self.a(x)), aux=x)


def test_a_graph_that_returns_an_ordered_dict_can_be_pickled() -> None:
    sparse = sparsify(Ordered(), 0.5)
    assert list(graphs(sparse)) == [""]
    result = pickle.loads(pickle.dumps(sparse))(X)
    assert type(result) is collections.OrderedDict
    assert list(result) == ["out", "aux"]
    assert torch.equal(result["out"], sparse(X)["out"])


class Encoder(nn.Module):
    def __init__(self, make: Callable[..., Any]) -> None:
        super().__init__()
        self.linear, self.make = nn.Linear(8, 8), make

    def forward(self, x: Tensor) -> Any:
        return self.make(hidden=self.linear(x))


@pytest.mark.parametrize("kind", [Output, Record])
def test_what_a_captured_child_returns_can_be_read(kind: type) -> None:
    def reads(self: Any, x: Tensor) -> Tensor:
        return x if python(x) else self.b(self.child(x).hidden)

    assert_faithful(case(reads, child=lambda: Encoder(kind)))


# Python state.

CALLS, COUNTER = [0], 0


class Frozen(collections.OrderedDict):
    def update(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("You cannot update this.")


class Tally:
    def __init__(self) -> None:
        self.seen = {"calls": [0]}


def frozen_configuration() -> Frozen:
    return Frozen(scale=2.0)


def counts_in_a_dict(self: Any, x: Tensor) -> Tensor:
    self.state["calls"][0] += 1
    return self.b(self.a(x)) * self.state["calls"][0]


def counts_in_an_object(self: Any, x: Tensor) -> Tensor:
    self.state.seen["calls"][0] += 1
    return self.b(self.a(x)) * self.state.seen["calls"][0]


def counts_in_an_array(self: Any, x: Tensor) -> Tensor:
    self.state += 1
    return self.b(self.a(x)) * float(self.state[0])


def counts_in_a_queue(self: Any, x: Tensor) -> Tensor:
    self.state.append(1)
    return self.b(self.a(x)) * len(self.state)


def counts_in_its_class(self: Any, x: Tensor) -> Tensor:
    type(self).calls = getattr(type(self), "calls", 0) + 1
    return self.b(self.a(x)) * (type(self).calls % 1)


def has_a_generator(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) + torch.rand(2, generator=self.state)


def has_a_numpy_generator(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) + float(self.state.random())


def has_a_python_generator(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) + self.state.random()


def reads_a_configuration(self: Any, x: Tensor) -> Tensor:
    return x if python(x) else self.b(self.a(x)) * self.state["scale"]


STATES = {
    "dict": (counts_in_a_dict, lambda: {"calls": [0]}),
    "object": (counts_in_an_object, Tally),
    "array": (counts_in_an_array, lambda: np.zeros(1)),
    "queue": (counts_in_a_queue, collections.deque),
    "class": (counts_in_its_class, lambda: None),
    "torch": (has_a_generator, lambda: torch.Generator().manual_seed(1)),
    "numpy": (has_a_numpy_generator, lambda: np.random.default_rng(1)),
    "python": (has_a_python_generator, lambda: random.Random(1)),
    "frozen": (reads_a_configuration, frozen_configuration),
}


@pytest.mark.parametrize("name", STATES)
def test_python_state_is_neither_frozen_nor_moved(name: str) -> None:
    forward, make = STATES[name]
    if name == "torch":  # which Python's copy shares between copies
        model = case(forward, state=make)()
        before = model.state.get_state()
        sparsify(model, 0.5)
        assert torch.equal(model.state.get_state(), before)
        assert "random" in str(trace(model).opaque) or "writes" in str(trace(model).opaque)
        return
    assert_faithful(case(forward, state=make))


class CountsGlobally(Two):
    def forward(self, x: Tensor) -> Tensor:
        global COUNTER
        COUNTER += 1
        CALLS[0] += 1
        return self.b(self.a(x)) * COUNTER * CALLS[0]


def test_globals_are_neither_frozen_nor_moved() -> None:
    model = CountsGlobally()
    sparse = sparsify(model, 1.0)
    assert (COUNTER, CALLS) == (0, [0])
    first, second = sparse(X), sparse(X)
    assert (COUNTER, CALLS) == (2, [2])
    torch.testing.assert_close(second, 4 * first)


# Children of the library's own.


class Chain(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        if python(x):
            return x
        for layer in self:
            x = layer(x)
        return x * len(self)


class Modules(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        if python(x):
            return x
        for layer in self:
            x = layer(x)
        return self[-1](self[0](x)) if len(self) == 1 else x


class Named(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:
        if python(x):
            return x
        for layer in self.values():
            x = layer(x)
        return x * len(list(self.items()))


class WeightAndChildren(Two):
    """Meets its own children, and has a weight of its own whose mask is not one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        if python(x):
            return x
        for layer in self.children():
            x = layer(x)
        return x @ self.w


CHAINS: dict[str, Callable[[], nn.Module]] = {
    "Sequential": lambda: Chain(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)),
    "ModuleList": lambda: Modules([nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)]),
    "ModuleDict": lambda: Named({"a": nn.Linear(8, 8), "b": nn.Linear(8, 2)}),
    "children": WeightAndChildren,
}


@pytest.mark.parametrize("name", CHAINS)
def test_nobody_meets_our_children(name: str) -> None:
    sparse = assert_faithful(CHAINS[name], inputs=X)
    dense = CHAINS[name]()
    assert [n for n, _ in sparse.named_children()] == [n for n, _ in dense.named_children()]
    assert len(list(sparse.children())) == len(list(dense.children()))
    layer = next(iter(sparse.children()))
    assert not list(layer.children())  # people tell layers by their having no children
    # What torch does with children reaches ours: modes, devices, states.
    assert all(not m.training for m in sparse.eval().modules())
    assert all(b.is_meta for b in sparse.to("meta").buffers())
    assert any("weight_mask" in key for key in sparse.state_dict())


# Hooks.


def test_hooks_that_keep_or_change_outputs() -> None:
    class Keeps(Two):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Tensor] = []
            self.a.register_forward_hook(lambda module, args, out: self.seen.append(out))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.clear()
            self.a(x)
            return self.b(self.seen[0])

    model = Keeps()
    expected = model(X)
    for net in (model, sparsify(model, 1.0)):
        assert torch.equal(net(X), expected)
        assert flop_report(net, (4, 8)).dense_macs == 4 * (64 + 16)
    assert len(model.seen) == 1
    assert not model.seen[0].is_meta


@pytest.mark.parametrize("where", ["a", "inner", "inner.0", ""])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_run_wherever_they_are(where: str, when: str) -> None:
    class Nested(Two):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.inner(self.a(x)))

    def hook(net: nn.Module) -> None:
        net.get_submodule(where).register_forward_hook(lambda m, args, out: out * 2)
        net.get_submodule(where).register_forward_pre_hook(lambda m, args: (args[0] + 1,))

    model = Nested()
    if when == "before":
        hook(model)
    sparse = sparsify(model, 1.0)
    if when == "after":
        hook(model), hook(sparse)
    assert torch.equal(sparse(X), model(X))
    assert flop_report(sparse, X).dense_macs == flop_report(model, X).dense_macs == 4 * (64 + 64 + 16)


def test_a_backward_hook_on_a_traced_module_runs() -> None:
    sparse = sparsify(nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 2)), 0.5)
    seen = []
    sparse[0].register_full_backward_hook(lambda m, grads_in, grads_out: seen.append(m))
    sparse(X.clone().requires_grad_()).sum().backward()
    assert seen == [sparse[0]]


class Drops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.linear(x), 0.5, self.training)


def test_modes_of_parts_are_their_own() -> None:
    """A frozen part in evaluation mode does not drop out, as in the original."""
    torch.manual_seed(0)
    model = nn.Sequential(Drops(), nn.Linear(8, 2)).train()
    sparse = sparsify(model, 1.0)
    for net in (model, sparse):
        net[0].eval()
    assert torch.equal(sparse(X), model(X))


# Every mask is used.


class InAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.groups = nn.ModuleList([nn.ModuleList([nn.Linear(8, 8)]), nn.ModuleDict({"in": nn.Linear(8, 8)})])

    def forward(self, x: Tensor) -> Tensor:
        return x if python(x) else self.groups[1]["in"](self.groups[0][0](x))


class ByName(Two):
    def forward(self, x: Tensor) -> Tensor:
        return x if python(x) else self.b(F.linear(x, getattr(self.a, "weight").clone(), None))  # noqa: B009


class OfARecurrentLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x if python(x) else self.gru(x)[0] @ self.gru.weight_hh_l0[:8]


class LayersOfAnEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x[None]
        return x if python(x) else self.encoder.layers[1].linear2(self.encoder.layers[0](x).repeat(1, 1, 2))


class Tied(Two):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return x if python(x) else self.b(self.a(x)) @ self.b.weight


READERS = {kind.__name__: kind for kind in (InAList, ByName, OfARecurrentLayer, LayersOfAnEncoder, Tied)}


@pytest.mark.filterwarnings("ignore:Dropped weights were written to")
@pytest.mark.parametrize("name", READERS)
def test_every_mask_is_used(name: str) -> None:
    torch.manual_seed(0)
    sparse = sparsify(READERS[name](), {"*": 0.3}, method="static", inputs=X)
    sparse(X).square().mean().backward()
    masks = sparse.updater.masks
    assert masks.keys() == {n for n, p in sparse.named_parameters() if p.dim() == 2}
    for weight, mask in masks.items():
        gradient = sparse.get_parameter(weight).grad
        assert gradient is None or not gradient[~mask].any()
    expected = sparse.eval()(X)
    with torch.no_grad():
        for weight, mask in masks.items():
            sparse.get_parameter(weight)[~mask] = 7.0
    assert torch.equal(sparse(X), expected)


class ReplacesData(Two):
    def forward(self, x: Tensor) -> Tensor:
        self.a.weight.data = F.normalize(self.a.weight.data)
        return x if python(x) else self.b(self.a(x))


def test_a_weight_whose_data_code_assigns_stays_dense() -> None:
    assert_faithful(ReplacesData)
    rules = sparsify(ReplacesData(), 0.5).updater.rules
    assert rules.keys() == {"a.weight"}
    assert "assigns its .data" in rules["a.weight"]


class PastItsMask(Two):
    def forward(self, x: Tensor) -> Tensor:
        return x if python(x) else self.b(F.linear(x, next(self.a.parameters())))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_read_past_the_mask_is_refused(inplace: bool) -> None:
    model = PastItsMask()
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"a\.weight.* past its mask.*exclude=\['a\.weight'\]"):
        sparsify(model, 0.5, inputs=X, inplace=inplace)
    assert kinds == [type(m) for m in model.modules()]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert sparsify(model, 0.5, inputs=X, exclude=["a.weight"]).updater.masks.keys() == {"b.weight"}


# Verification.


class Unseen(nn.Module):
    """Decides by text that a proxy makes otherwise than a tensor does, which nothing notices but running it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (2 if "float32" in str(x.dtype) else 3)


class Nondeterministic(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) + torch.tensor(np.random.default_rng().random())


def test_verification_finds_what_differs_and_leaves_it_in_python() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Unseen(), nn.Linear(8, 2))
    with pytest.warns(UserWarning, match=r"stays Python code\. Verification: as a graph, outputs differ"):
        sparse = sparsify(model, 1.0, inputs=X, verify=True)
    assert torch.equal(sparse(X), model(X))
    assert not torch.equal(sparsify(model, 1.0)(X), model(X))  # else there would be nothing to find


def test_verification_of_a_model_that_is_right_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    sparse = sparsify(model, 0.5, inputs=(4, 8), verify=True)
    assert list(graphs(sparse)) == [""]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


BAD_VERIFICATION: dict[str, tuple[nn.Module, dict[str, Any], str]] = {
    "no inputs": (Two(), {}, "verify=True needs inputs"),
    "meta": (nn.Sequential(nn.Linear(8, 8, device="meta")), {"inputs": X}, "give inputs with values"),
    "shape": (
        nn.Sequential(nn.Linear(8, 8)),
        {"inputs": (4, 7)},
        "the model itself fails on these inputs in training mode",
    ),
    "random": (Nondeterministic(), {"inputs": X}, "two runs of the model itself differ"),
}


@pytest.mark.parametrize("name", BAD_VERIFICATION)
def test_verification_that_cannot_run_says_so(name: str) -> None:
    model, options, message = BAD_VERIFICATION[name]
    with pytest.raises(ValueError, match=message):
        sparsify(model, 0.5, verify=True, **options)


def test_reasons_name_file_and_line() -> None:
    reason = trace(case(decorated_helper)()).opaque
    assert not reason  # the function alone stays Python, the model is a graph
    reason = trace(case(set_grad_enabled)()).opaque[""]
    assert "is_grad_enabled changed" in reason
    assert "test_capture.py:" in reason


def test_a_broken_graph_is_named_with_its_stage_and_node() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    capture = trace(model)
    graph = capture.regions[""].graphs[True]
    check_graphs("capture", model, capture.regions)
    linear = next(node for node in graph.nodes if node.target == "0")
    linear.target = "gone"
    install(model, capture)
    with pytest.raises(RuntimeError, match=r"After masking, the graph of 'Sequential' is broken: .*gone"):
        check_graphs("masking", model, capture.regions)
