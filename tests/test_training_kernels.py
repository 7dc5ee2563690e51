"""Training with kept weights only: equal to the masked path in all it computes, and out of the way where it cannot run."""

import copy
import math
import os
import pickle
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SmallNet
from networks import WideResNet22
from torch import Tensor, nn
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from passes.kernels import cache, compiler
from passes.kernels.norms import normalize
from passes.kernels.order import order_of
from passes.kernels.pools import max_pool
from passes.kernels.products import convolve, linear
from passes.kernels.training_costs import training_cycles
from passes.kernels.windows import Kept, Window
from passes.masking import norms, pools, products
from passes.masking.mask import masks_of
from sparsify import GMP, NM, SET, SNFS, RigL, SRigL, Static, compress, fold, graphs, sparsify, use_kernels

pytestmark = pytest.mark.skipif(compiler.native() is None, reason="there is no C++ compiler here")


def assert_close(got: list[Any], expected: list[Any]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        a, b = a.detach(), b.detach()
        apart = float((a - b).abs().max()) if a.numel() else 0.0
        assert apart <= 2e-5 * max(1.0, float(b.abs().max()) if b.numel() else 0.0)


def check(x: Tensor, weight: Tensor, mask: Tensor, window: Window, *, bias: bool = True, dense: bool = False) -> None:
    """Compare output and gradients with those of torch on the masked weight, in float64, whose loops are torch's plainest.

    oneDNN, which computes in float32, writes past its memory for 1x1 kernels of stride 3, channels last, on AVX2 (torch 2.14).
    """
    generator = torch.Generator().manual_seed(1)
    b = torch.randn(weight.shape[0], generator=generator) if bias else None
    given = [x.requires_grad_(), weight.requires_grad_(), *([b.requires_grad_()] if b is not None else [])]
    y = convolve(x, weight, b, mask, window, dense)
    grad = torch.randn(y.shape, generator=generator)
    if y.dim() == 4 and not y.is_contiguous():
        grad = grad.contiguous(memory_format=torch.channels_last)
    got = torch.autograd.grad(y, given, grad)
    kept = torch.where(mask, weight, 0).detach().double().requires_grad_()
    exact, b = x.detach().double().requires_grad_(), None if b is None else b.detach().double().requires_grad_()
    options = {"stride": window.stride, "padding": window.padding, "dilation": window.dilation, "groups": window.groups}
    expected = F.conv2d(exact, kept, b, **options)
    wanted = torch.autograd.grad(expected, [exact, kept, *([b] if b is not None else [])], grad.double())
    of_weight = wanted[1] if dense else torch.where(mask, wanted[1], 0)
    assert_close([y, *got], [expected, wanted[0], of_weight, *wanted[2:]])
    assert dense or not got[1][~mask].any()


# images, inputs, rows, columns, outputs, kernel, stride, padding, dilation, groups
LAYERS = {
    "1x1": (16, 8, 6, 7, 12, 1, 1, 0, 1, 1),
    "1x1 of stride 2": (5, 8, 9, 7, 6, 1, 2, 0, 1, 1),
    "1x1 with padding": (3, 4, 5, 5, 6, 1, 1, 1, 1, 1),
    "3x3": (9, 5, 7, 9, 6, 3, 1, 1, 1, 1),
    "3x3 without padding": (4, 5, 8, 6, 6, 3, 1, 0, 1, 1),
    "3x3 of stride 2": (10, 6, 9, 8, 6, 3, 2, 1, 1, 1),
    "3x3 of stride 3": (4, 6, 8, 11, 5, 3, 3, 1, 1, 1),
    "3x3 of dilation 2": (3, 5, 11, 10, 4, 3, 1, 2, 2, 1),
    "stride and dilation": (3, 5, 12, 11, 4, 3, 2, 2, 3, 1),
    "5x5": (2, 3, 12, 11, 8, 5, 2, 2, 1, 1),
    "7x7": (2, 3, 20, 18, 4, 7, 2, 3, 1, 1),
    "groups": (4, 8, 7, 7, 6, 3, 1, 1, 1, 2),
    "depthwise": (4, 6, 9, 9, 12, 3, 2, 1, 1, 6),
    "a single pixel": (1, 4, 1, 1, 3, 1, 1, 0, 1, 1),
    "a single image": (1, 4, 5, 3, 3, 3, 1, 1, 1, 1),
    "padding wider than the kernel": (2, 3, 4, 4, 3, 3, 1, 4, 1, 1),
    "a kernel as large as the image": (2, 3, 4, 5, 3, 4, 1, 0, 1, 1),
    "a stride larger than the kernel": (2, 3, 9, 9, 4, 1, 3, 0, 1, 1),
    "images in parts": (2, 300, 41, 40, 6, 3, 1, 1, 1, 1),
    "strided images in parts": (2, 6, 49, 41, 300, 3, 2, 1, 1, 1),
    "many images": (70, 3, 4, 4, 4, 3, 1, 1, 1, 1),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_layers(layer: tuple[int, ...], layout: torch.memory_format, threads: int) -> None:
    n, c, rows, columns, o, k, stride, padding, dilation, groups = layer
    window = Window((stride, stride), (padding, padding), (dilation, dilation), groups)
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    try:
        for density, share in ((0.0, 1), (0.1, 1), (0.5, 1), (1.0, 1), (0.3, 2), (0.3, 4)):  # of outputs, a pattern
            if o // groups % share:
                continue
            x, weight = torch.randn(n, c, rows, columns).contiguous(memory_format=layout), torch.randn(o, c // groups, k, k)
            mask = (torch.rand(weight[::share].shape) < density).repeat_interleave(share, 0)
            check(x, weight, mask, window, bias=density < 1)
    finally:
        torch.set_num_threads(1)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_layer(data: Any) -> None:
    def number(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    groups = data.draw(st.sampled_from([1, 1, 2, 3]))
    kernel, stride, dilation = ((number(1, 4), number(1, 4)), (number(1, 3), number(1, 3)), (number(1, 2), number(1, 3)))
    padding = (number(0, 3), number(0, 3))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    rows, columns = number(least[0], least[0] + 9), number(least[1], least[1] + 9)
    torch.manual_seed(number(0, 9))
    x, weight = torch.randn(number(1, 5), groups * number(1, 4), rows, columns), None
    share = data.draw(st.sampled_from([1, 2, 4]))
    weight = torch.randn(groups * share * number(1, 4), x.shape[1] // groups, *kernel)
    mask = (torch.rand(weight[::share].shape) < data.draw(st.floats(0, 1))).repeat_interleave(share, 0)
    check(x, weight, mask, Window(stride, padding, dilation, groups), dense=data.draw(st.booleans()))


@pytest.mark.parametrize("shape", [(1, 33), (7, 33), (128, 33), (4, 7, 33), (2, 3, 5, 33), (700, 33)])
def test_linear_layers(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(shape).requires_grad_(),
        torch.randn(20, 33).requires_grad_(),
        torch.randn(20).requires_grad_(),
    )
    mask = torch.rand(20, 33) < 0.3
    y, expected = linear(x, weight, bias, mask, False), F.linear(x, torch.where(mask, weight, 0), bias)
    grad = torch.randn_like(y)
    given = (x, weight, bias)
    assert_close([y, *torch.autograd.grad(y, given, grad)], [expected, *torch.autograd.grad(expected, given, grad)])


def test_results_are_the_same_to_the_bit_every_time() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    try:
        x, weight = torch.randn(9, 16, 12, 12), torch.randn(8, 16, 3, 3).requires_grad_()
        mask = torch.rand(weight.shape) < 0.2
        found = []
        for _ in range(5):
            y = convolve(x, weight, None, mask, Window(padding=(1, 1)), False)
            found.append((y, *torch.autograd.grad(y.square().sum(), weight)))
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    finally:
        torch.set_num_threads(1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of torch's own check
def test_operators_fit_torch() -> None:
    x, weight = torch.randn(3, 4, 6, 6, requires_grad=True), torch.randn(5, 4, 3, 3, requires_grad=True)
    mask = torch.rand(weight.shape) < 0.5
    opcheck(torch.ops.sparsify.convolve.default, (x, weight, None, mask, [1, 1], [1, 1], [1, 1], 1, False))
    opcheck(torch.ops.sparsify.convolve.default, (x, weight, None, mask, [2, 2], [1, 1], [1, 1], 1, True))
    gain, bias = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    for other in (None, torch.randn(3, 4, 6, 6)):
        opcheck(torch.ops.sparsify.normalize.default, (x, gain, bias, other, 1e-5, True))
    opcheck(torch.ops.sparsify.max_pool.default, (x, [3, 3], [2, 2], [1, 1]))


def test_second_derivatives_are_those_of_the_masked_weight() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 4, 6, 6, requires_grad=True), torch.randn(5, 4, 3, 3, requires_grad=True)
    mask = torch.rand(weight.shape) < 0.5

    def second(y: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(y.square().sum(), (x, weight), create_graph=True)
        return list(torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), (x, weight)))

    expected = second(F.conv2d(x, torch.where(mask, weight, 0), padding=1))
    assert_close(second(convolve(x, weight, None, mask, Window(padding=(1, 1)), False)), expected)
    gain, bias, other = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True), torch.randn(3, 4, 6, 6)

    def second_of_norm(y: Tensor) -> list[Tensor]:
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), (x, gain)))

    wanted = second_of_norm((F.batch_norm(x, None, None, gain, bias, True) + other).relu())
    assert_close(second_of_norm(normalize(x, gain, bias, other, 1e-5, True)[0]), wanted)
    first, second_of_pool = ((x * gain[:, None, None]).square() for _ in range(2))
    pooled = [second_of_norm(y) for y in (F.max_pool2d(first, 3, 2, 1), max_pool(second_of_pool, (3, 3), (2, 2), (1, 1)))]
    assert_close(*pooled)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (16, 8, 4, 4), (5, 6, 1, 1), (3, 4, 9, 9)])
def test_norms(shape: tuple[int, ...], add: bool, relu: bool) -> None:
    """Against float64, with means far from 0, where squares would cancel."""
    torch.manual_seed(0)
    given = [torch.randn(shape) * 2 + 50, torch.randn(shape[1]), torch.randn(shape[1]), *([torch.randn(shape)] if add else [])]
    exact = [t.double().requires_grad_() for t in given]
    given = [t.requires_grad_() for t in given]
    y, mean, variance = normalize(*given[:3], given[3] if add else None, 1e-5, relu)
    expected = F.batch_norm(exact[0], None, None, exact[1], exact[2], True)
    expected = expected + exact[3] if add else expected
    expected = expected.relu() if relu else expected
    grad = torch.randn(shape)
    assert_close([y, mean], [expected, exact[0].mean((0, 2, 3))])
    torch.testing.assert_close(variance.double(), exact[0].var((0, 2, 3), correction=0), rtol=1e-4, atol=0)
    assert_close(list(torch.autograd.grad(y, given, grad)), list(torch.autograd.grad(expected, exact, grad.double())))


POOLS = [  # shape, kernel, stride, padding
    ((2, 3, 9, 11), (3, 3), (2, 2), (1, 1)),
    ((2, 3, 40, 70), (3, 3), (2, 2), (1, 1)),
    ((1, 5, 8, 8), (2, 2), (2, 2), (0, 0)),
    ((2, 2, 7, 33), (3, 2), (1, 1), (1, 0)),
    ((1, 2, 17, 50), (5, 3), (4, 3), (2, 1)),
    ((3, 1, 6, 6), (6, 6), (1, 1), (3, 3)),
]


@pytest.mark.parametrize("values", ["any", "few", "-inf", "NaN"])
@pytest.mark.parametrize(("shape", "kernel", "stride", "padding"), POOLS)
def test_max_pools(shape: tuple[int, ...], kernel: Any, stride: Any, padding: Any, values: str) -> None:
    """To the bit: which of equal pixels, of those that are -inf, or of those that are NaN, gets the gradient."""
    torch.manual_seed(0)
    x = torch.randn(shape) if values == "any" else torch.randint(0, 3, shape).float()
    x = torch.where(torch.rand(shape) < 0.7, float(values), x) if values in ("-inf", "NaN") else x
    x.requires_grad_()
    expected, y = F.max_pool2d(x, kernel, stride, padding), max_pool(x, kernel, stride, padding)
    grad = torch.randn(y.shape).round(decimals=1)
    equal = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(y, expected, **equal)
    (found,), (wanted,) = (torch.autograd.grad(result, x, grad.round()) for result in (y, expected))  # sums of integers
    torch.testing.assert_close(found, wanted, **equal)


class Pools(nn.Module):
    """Pools that run natively, and others that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.usual, self.pairs = nn.MaxPool2d(3, 2, 1), nn.MaxPool2d((2, 3), (1, 2), (1, 0))
        self.up, self.wide = nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(self.up(self.pairs(self.usual(self.conv(x)))))


@pytest.mark.usefixtures("_small_norms_too")
def test_pools_of_models(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    masked, sparse = pair(Pools())
    x, called = torch.randn(2, 3, 32, 32), []
    monkeypatch.setattr(pools, "max_pool", lambda *given: called.append(given[1:]) or max_pool(*given))
    for model in (masked, sparse):
        model(x).square().sum().backward()
    assert called == [((3, 3), (2, 2), (1, 1)), ((2, 3), (1, 2), (1, 0))]
    assert_close([p.grad for p in sparse.parameters()], [p.grad for p in masked.parameters()])
    sparse.usual.register_forward_hook(lambda *_: called.append("hook"))
    sparse(x)
    assert called[2:] == ["hook", ((2, 3), (1, 2), (1, 0))]
    for model in (masked, sparse):
        with pytest.raises(RuntimeError, match="Output size is too small"):
            model(torch.randn(2, 3, 2, 2))


# Models


class Residual(nn.Module):
    """Norms before a ReLU module, a ReLU by function, an addition, and nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(3))
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(8) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.bn3(self.conv3(F.relu(out))).mean((2, 3))


@pytest.fixture
def _small_norms_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "_LEAST", 1)


def pair(model: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The same sparse model with masked weights, and with kept weights only."""
    options = {"density": 0.3, "method": "static", **options}
    density = options.pop("density")
    return tuple(sparsify(copy.deepcopy(model), density, kernels=k, **options).train() for k in ("masked", "sparse"))  # pyright: ignore


@pytest.mark.usefixtures("_small_norms_too")
@pytest.mark.parametrize(
    ("make", "compiled"),
    [(Residual, False), (Residual, True), (WideResNet22, False), pytest.param(WideResNet22, True, marks=pytest.mark.sweep)],
)
def test_models_compute_the_same(make: type[nn.Module], compiled: bool) -> None:
    torch.manual_seed(0)
    masked, sparse = pair(make())
    if make is WideResNet22:
        use_kernels(sparse, "auto")
    x = torch.randn(4, 8 if make is Residual else 3, 16, 16)
    calls = [masked, torch.compile(sparse, backend="aot_eager", fullgraph=True) if compiled else sparse]
    results = []
    for model, call in zip((masked, sparse), calls, strict=True):
        loss = call(x.clone()).square().mean()
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters()), *(b for n, b in model.named_buffers() if "mask" not in n)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert [str(n) for n in graphs(sparse)[""].nodes] == [str(n) for n in graphs(masked)[""].nodes]  # what is looked at stays
    assert torch.equal(masked.eval()(x), fold(masked).eval()(x))
    torch.testing.assert_close(fold(sparse).eval()(x), sparse.eval()(x))


class Called(nn.Module):
    """Python code that calls layers: a graph of one node each."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.image, self.head = nn.Conv1d(8, 6, 3, 2, 1), nn.Conv2d(1, 4, 3, padding=(0, 1)), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.isnan().any()):
            return x
        return self.head(self.image(self.line(x).unsqueeze(1)).mean((2, 3)))


class Functional(nn.Module):
    """Products of a graph with parameters, by position and by name; and one with what is computed from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"line": (6, 8, 3), "image": (4, 1, 3, 3), "last": (5, 4, 1, 1), "head": (5, 5), "scaled": (3, 5)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv1d(x, self.line, self.bias, 2, padding=1).unsqueeze(1)
        x = F.conv2d(F.conv2d(x, weight=self.image, padding=(0, 1)), self.last, None, 2, 1).mean((2, 3))
        x = F.linear(F.linear(input=x, weight=self.head), bias=None, weight=self.head)
        return F.linear(x, self.scaled / self.scaled.norm())


@pytest.mark.parametrize(("make", "sums"), [(Called, 3), (Functional, 5)])
def test_whoever_multiplies(make: type[nn.Module], sums: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    masked, sparse = pair(make(), density={"*": 0.3})
    ran: list[str] = []
    for one in (convolve, linear):
        monkeypatch.setattr(products, one.__name__, lambda *given, one=one: ran.append(one.__name__) or one(*given))
    x = torch.randn(4, 8, 16)
    for dense in (False, True):
        for model in (masked, sparse):
            for mask in masks_of(model).values():
                mask.dense_gradient = dense
            model.zero_grad()
            model(x).square().sum().backward()
        assert_close([p.grad for p in sparse.parameters()], [p.grad for p in masked.parameters()])
    assert len(ran) == 2 * sums
    assert_close([copy.deepcopy(sparse)(x), pickle.loads(pickle.dumps(sparse))(x)], [masked(x)] * 2)
    sparse.eval()(x)
    assert len(ran) == 4 * sums


METHODS = [
    Static(),
    SET(interval=8),
    RigL(interval=8),
    SNFS(interval=8),
    GMP(interval=8),
    SRigL(interval=8),
    NM(2, 4, interval=8),
]


@pytest.mark.parametrize("steps", [30, pytest.param(300, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_training_runs_alike(method: Any, steps: int) -> None:
    """Losses stay together to rounding, and masks to what rounding may decide otherwise."""
    torch.manual_seed(0)
    options = {"density": None if method.layout.fixed else 0.3, "method": method}
    losses, masks = [], []
    for model in pair(SmallNet(), **options):
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        model.updater.attach(optimizer, total_steps=steps + 10)
        losses.append([])
        for _ in range(steps):
            x, target = torch.randn(8, 3, 10, 10, generator=generator), torch.randint(0, 10, (8,), generator=generator)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        masks.append(model.updater.masks)
        assert all(not p[~masks[-1][n]].any() for n, p in model.named_parameters() if n in masks[-1])
    assert losses[0][:9] == pytest.approx(losses[1][:9], rel=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    apart = sum(int((a != masks[1][name]).sum()) for name, a in masks[0].items())
    assert apart <= 0.02 * sum(mask.numel() for mask in masks[0].values())


def test_a_run_goes_on_with_other_kernels() -> None:
    torch.manual_seed(0)
    _, model = pair(SmallNet(), method=RigL(interval=4))
    other = sparsify(SmallNet(), 0.3, method=RigL(interval=4), seed=1)
    other.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(other.train()(x), model(x))
    assert copy.deepcopy(model)(x).equal(model(x))
    use_kernels(other, "sparse")
    assert other(x).equal(model(x))


def test_patterns_follow_their_masks() -> None:
    """By hand, and by a state_dict with other masks in the middle of training."""
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(nn.Linear(24, 16)), 0.5, kernels="sparse").train()
    x, mask = torch.randn(32, 24), next(iter(model.updater.masks.values()))
    model(x)
    with torch.no_grad():
        mask[:4] = True
        mask[4:8] = False
        model[0].weight.normal_()
    torch.testing.assert_close(model(x), F.linear(x, torch.where(mask, model[0].weight, 0), model[0].bias))
    other = sparsify(nn.Sequential(nn.Linear(24, 16)), 0.5, seed=3)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(x), other.train()(x))


def test_weights_that_lie_channels_last() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(5, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2))
    masked, sparse = (m.to(memory_format=torch.channels_last) for m in pair(model))
    x = torch.randn(4, 5, 9, 9).to(memory_format=torch.channels_last)
    for m in (masked, sparse):
        m(x).square().mean().backward()
    assert sparse[2].weight.grad.is_contiguous(memory_format=torch.channels_last)
    assert_close([p.grad for p in sparse.parameters()], [p.grad for p in masked.parameters()])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups", "group", "channels", "chunks"),
    [
        ((8, 6, 3, 3), 1, 1, 2, 3),
        ((8, 6, 1, 3), 1, 2, 4, 1),
        ((12, 2, 3, 3), 3, 4, 1 << 30, 2),
        ((600, 400, 1, 1), 1, 1, 64, 5),  # enough for several threads
        ((64, 40, 5, 5), 1, 2, 16, 4),
    ],
)
def test_the_order_is_that_of_a_sort(
    shape: tuple[int, ...], groups: int, group: int, channels: int, chunks: int, last: bool, transposed: bool
) -> None:
    rng = np.random.default_rng(0)
    mask = np.repeat(rng.random((shape[0] // group, *shape[1:])) < 0.6, group, axis=0)
    kept = Kept.of(mask, groups, last)
    assert kept.group == group
    shifts = [None if transposed and tap % 3 == 1 else 7 * tap for tap in range(shape[2] * shape[3])]
    library = compiler.native()
    assert library is not None
    order = order_of(library, kept, shifts, 100, channels=channels, chunk_weights=500, chunks=chunks, transposed=transposed)
    # Every kept weight of a part, as it lies: what it adds to, what it multiplies there, and where it is stored.
    axes = (0, 2, 3, 1) if last else (0, 1, 2, 3)
    outputs, *rest = np.unravel_index(np.flatnonzero(mask.transpose(axes)), [shape[axis] for axis in axes])
    inputs, rows, columns = (rest[axes.index(axis) - 1] for axis in (1, 2, 3))
    inputs = inputs + outputs // (shape[0] // groups) * shape[1]
    taps = rows * shape[3] + columns
    part = np.array([shifts[tap] is not None for tap in taps])
    sums, summed, size = (inputs, outputs, 1) if transposed else (outputs, inputs, group)
    chunk = np.searchsorted(order.chunk_groups, sums // size, side="right") - 1
    first = np.flatnonzero(part & (sums % size == 0))
    wanted = first[np.lexsort((first, sums[first] // size, summed[first] // channels, chunk[first]))]
    assert order.offsets.tolist() == [100 * summed[k] + (shifts[taps[k]] or 0) for k in wanted]
    assert order.index.tolist() == kept.index[part].tolist()
    at = order.place // size
    assert (sums[part] - sums[wanted][at] == order.place % size).all()
    assert (summed[part] == summed[wanted][at]).all()
    assert (taps[part] == taps[wanted][at]).all()
    sizes = np.diff(order.chunk_groups)
    assert len(sizes) >= min(chunks, len(mask) // size)
    assert order.widest == sizes.max()
    cells = [(c, b, g) for c in range(len(sizes)) for b in range(order.blocks) for g in range(*order.chunk_groups[c : c + 2])]
    found = Counter(zip(chunk[wanted], summed[wanted] // channels, sums[wanted] // size, strict=True))
    assert order.starts[0] == 0
    assert np.diff(order.starts).tolist() == [found[cell] for cell in cells]


def test_tables_are_shared_by_numbers_of_tokens() -> None:
    model = sparsify(nn.Sequential(nn.Linear(96, 64)), 0.2, kernels="sparse").train()
    mask = next(iter(model.updater.masks.values()))
    for tokens in (65, 300, 1000, 7000, 7001, 9000):
        x = torch.randn(tokens, 96, requires_grad=True)
        torch.testing.assert_close(model(x), F.linear(x, model[0].weight, model[0].bias), rtol=1e-4, atol=1e-5)
        model(x).sum().backward()
    sums = cache._PREPARED[mask]
    assert len(sums.found) <= 3 * cache._SHAPES
    assert all(len(tables) <= 2 for tables in sums.tables.values())


def test_gradients_add_up_and_are_computed_again() -> None:
    torch.manual_seed(0)
    masked, sparse = pair(SmallNet())
    x = torch.randn(4, 3, 10, 10)
    for model in (masked, sparse):
        model(x).square().mean().backward()
        checkpoint(model, x, use_reentrant=False).square().mean().backward()
    assert_close([p.grad for p in sparse.parameters()], [p.grad for p in masked.parameters()])


@pytest.mark.usefixtures("_small_norms_too")
def test_hooks_on_norms_and_relus_run() -> None:
    torch.manual_seed(0)
    _, model = pair(Residual())
    x, seen = torch.randn(4, 8, 6, 6), []
    before = model(x)
    model.bn1.register_forward_hook(lambda *_: seen.append("norm"))
    model.relu.register_forward_hook(lambda *_: seen.append("relu"))
    torch.testing.assert_close(model(x), before)
    assert seen == ["norm", "relu"]


class Odd(nn.Module):
    """A convolution that pads otherwise, one in three dimensions, one without a batch, and one along a line."""

    def __init__(self) -> None:
        super().__init__()
        self.circular = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
        self.same = nn.Conv2d(4, 4, 3, padding="same")
        self.volume = nn.Conv3d(1, 2, 3)
        self.line = nn.Conv1d(4, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.same(self.circular(x))
        return self.line(x.flatten(2)).mean() + self.volume(x[:, None]).mean() + self.line(x[0].flatten(1)).mean()


@pytest.mark.filterwarnings("ignore:kernels='sparse'")
def test_what_the_sums_do_not_take_runs_masked() -> None:
    torch.manual_seed(0)
    masked, sparse = pair(Odd())
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(sparse(x), masked(x))
    torch.testing.assert_close(sparse.double()(x.double()), masked.double()(x.double()))
    masked, sparse = pair(SmallNet())
    with torch.autocast("cpu", torch.bfloat16):
        assert sparse(x).equal(masked(x))
    parameters = dict(sparse.named_parameters())

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(sparse.eval(), p, (x,)).square().sum()

    sparse.train()
    assert torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:, None])["fc.weight"].shape[0] == 2


def test_a_fallback_is_said_once() -> None:
    products._say.cache_clear()
    model = sparsify(nn.Sequential(nn.Linear(8, 8)), 0.5, kernels="sparse").double().train()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model(torch.randn(4, 8, dtype=torch.float64))
        model(torch.randn(4, 8, dtype=torch.float64))
    assert [str(w.message) for w in said] == [
        "kernels='sparse': MaskedLinear layers run the masked weight where numbers are not float32."
    ]


def test_without_native_loops_everything_runs_masked() -> None:
    code = (
        "import torch\nfrom torch import nn\nfrom sparsify import sparsify\nfrom passes.kernels.products import linear\n"
        "model = sparsify(nn.Sequential(nn.Linear(8, 8)), 0.5, kernels='auto').train()\n"
        "model(torch.randn(2, 8)).sum().backward()\nprint(int((model[0].weight.grad != 0).sum()))\n"
        "w = torch.randn(8, 8, requires_grad=True)\nmask = torch.rand(8, 8) < 0.5\n"
        "linear(torch.randn(4, 8, requires_grad=True), w, None, mask, False).sum().backward()\n"
        "assert torch.equal(w.grad != 0, mask)\n"
    )
    environment = {**os.environ, "SPARSIFY_NATIVE": "0", "PYTHONPATH": str(Path(compiler.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "32"


class Doubled(nn.Conv2d):
    """What a subclass of torch's does with the weight is its own."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, 2 * weight, bias)


@pytest.mark.filterwarnings("ignore:kernels='sparse'")
def test_code_of_subclasses_runs() -> None:
    masked, sparse = pair(nn.Sequential(Doubled(4, 6, 3)), density={"*": 0.5})
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(sparse(x), masked(x))
    bias = torch.randn(6)  # of torch.func, which the sums leave to torch
    _, plain = pair(nn.Sequential(nn.Conv2d(4, 6, 3)), density={"*": 0.5})
    found = torch.func.grad(lambda b: torch.func.functional_call(plain, {"0.bias": b}, x).sum())(bias)
    torch.testing.assert_close(found, torch.full((6,), 2.0 * 16))


MISFITS = {  # a layer, and what torch refuses to give it
    "features": (nn.Linear(64, 32), (5, 20)),
    "more features": (nn.Linear(64, 32), (5, 80)),
    "no dimension": (nn.Linear(64, 32), ()),
    "channels": (nn.Conv2d(16, 8, 3), (2, 8, 9, 9)),
    "groups": (nn.Conv2d(16, 8, 3, groups=2), (2, 8, 9, 9)),
    "channels of a line": (nn.Conv1d(16, 8, 3), (2, 8, 9)),
    "an image smaller than the kernel": (nn.Conv2d(16, 8, 5), (2, 16, 3, 9)),
}


@pytest.mark.parametrize("made", [lambda m: use_kernels(m, "auto"), lambda m: use_kernels(m, "sparse"), compress])
@pytest.mark.parametrize("case", MISFITS)
@pytest.mark.filterwarnings("ignore:kernels='sparse'")
def test_what_does_not_fit_is_refused_as_torch_does(case: str, made: Any) -> None:
    layer, shape = MISFITS[case]
    model, x = made(sparsify(nn.Sequential(copy.deepcopy(layer)), {"*.weight": 0.05})), torch.ones(shape)
    with pytest.raises(RuntimeError) as expected:
        layer(x)
    for mode in (True, False):
        with pytest.raises(RuntimeError) as got:
            model.train(mode)(x)
        assert str(got.value) == str(expected.value)


def test_the_operator_reads_nothing_that_is_not_there() -> None:
    mask, numbers = torch.ones(3, 4, 1, 1, dtype=torch.bool), ([1, 1], [0, 0], [1, 1], 1, False)
    weight = torch.ones(3, 4, 1, 1)
    with pytest.raises(ValueError, match="inputs of 4 channels and a bias of 3 numbers"):
        torch.ops.sparsify.convolve(torch.ones(1, 2, 5, 5), weight, None, mask, *numbers)
    with pytest.raises(ValueError, match="inputs of 4 channels and a bias of 3 numbers"):
        torch.ops.sparsify.convolve(torch.ones(1, 4, 5, 5), weight, torch.ones(2), mask, *numbers)
    with pytest.raises(ValueError, match="neither whole nor the kept values"):
        torch.ops.sparsify.convolve(torch.ones(1, 4, 5, 5), torch.ones(5, 1), None, mask, *numbers)


def test_bad_choices() -> None:
    with pytest.raises(ValueError, match=r"Unknown kernels 'spares'; known are auto, masked, sparse\. Did you mean 'sparse'"):
        sparsify(SmallNet(), 0.5, kernels="spares")
    with pytest.raises(ValueError, match="Unknown kernels"):
        use_kernels(sparsify(SmallNet(), 0.5), "fast")
    with pytest.raises(ValueError, match="takes a masked model"):
        use_kernels(SmallNet(), "auto")


@pytest.mark.parametrize(("density", "size", "sums"), [(1.0, 64, False), (0.05, 512, True), (0.05, 8, False)])
def test_auto_takes_what_pays(density: float, size: int, sums: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparsify(nn.Sequential(nn.Linear(size, size)), {"*": density}, kernels="auto").train()
    called: list[int] = []
    monkeypatch.setattr("passes.masking.products.linear", lambda x, *_: called.append(1) or x)
    model(torch.randn(256, size))
    assert bool(called) == sums


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "density", "faster"),
    [  # as measured with vectors of eight
        (1, 2048, 1000, 0.1, "masked"),
        (16, 2048, 1000, 0.1, "sparse"),  # slower than dense, which is no choice
        (16, 512, 10, 0.02, "masked"),  # calls decide
        (4, 512, 512, 0.1, "masked"),
        (64, 512, 512, 0.1, "sparse"),
        (1, 4096, 4096, 0.02, "sparse"),  # whole weights have to be read, and masked
    ],
)
def test_auto_takes_what_is_faster_than_the_masked_weight(
    rows: int, inputs: int, outputs: int, density: float, faster: str
) -> None:
    kept = round(density * inputs * outputs)
    cycles = training_cycles(8, (1, inputs, 1, rows), (outputs, inputs), kept, Window())
    assert (cycles.sparse < cycles.masked) == (faster == "sparse")
    assert cycles.dense < cycles.masked
    assert training_cycles(0, (1, inputs, 1, rows), (outputs, inputs), kept, Window()).sparse == math.inf
