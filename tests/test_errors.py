"""Bad input: a clear error before any work, and nothing changed. And capture's traps."""

import copy
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models import SmallNet
from torch import Tensor, fx, nn

from passes import trace
from sparsify import Method, RigL, flop_report, fold, graph_table, graphs, sparsify
from sparsify.methods.scores import LayerState

BAD_CALLS = {
    "no budget": ({}, "exactly one of density and flops"),
    "two budgets": ({"density": 0.1, "flops": 0.1, "inputs": (1, 3, 8, 8)}, "exactly one of density and flops"),
    "zero": ({"density": 0}, r"must be a number in \(0, 1\]"),
    "above one": ({"density": 1.5}, r"must be a number in \(0, 1\]"),
    "nan": ({"density": math.nan}, r"must be a number in \(0, 1\]"),
    "text": ({"density": "0.1"}, r"must be a number in \(0, 1\]"),
    "bool": ({"density": True}, r"must be a number in \(0, 1\]"),
    "in a pattern": ({"density": {"conv*": 2}}, r"density of pattern 'conv\*' is 2; it must be a number"),
    "flops without inputs": ({"flops": 0.5}, "needs inputs"),
    "unreachable flops": ({"flops": 0.01, "distribution": "uniform", "inputs": (1, 3, 8, 8)}, "cannot be met"),
    "distribution": ({"density": 0.1, "distribution": "erd"}, "known are uniform, er, erk. Did you mean 'er"),
    "method": ({"density": 0.1, "method": "rigel"}, "Did you mean 'rigl'"),
    "method that is not called": ({"density": 0.1, "method": RigL}, r"Call it: RigL\(\)\."),
    "init": ({"density": 0.1, "init": "fan-in"}, "Did you mean 'fan_in'"),
    "exclude": ({"density": 0.1, "exclude": ["cnv1*"]}, "matches no weight; the nearest weight is"),
    "pattern": ({"density": {"head.*": 0.1}}, "matches no weight"),
    "no pattern": ({"density": {}}, "Every weight would stay dense"),
    "pattern without a number": ({"density": {"fc*": None}}, "density of pattern 'fc\\*' is None; it must be a number"),
    "exclude a number": ({"density": 0.1, "exclude": 5}, "takes fnmatch patterns"),
    "list of distributions": ({"density": 0.1, "distribution": ["erk"]}, "Unknown distribution"),
    "all excluded": ({"density": 0.1, "exclude": ["*"]}, "nothing left to mask"),
    "distribution that returns no mapping": (
        {"density": 0.1, "distribution": lambda s, d: 3},
        "returned 3; it must return",
    ),
    "distribution of other names": (
        {"density": 0.1, "distribution": lambda s, d: {"conv1": 0.5}},
        "names 'conv1', which is not a weight; weights are conv1.weight",
    ),
    "seed": ({"density": 0.1, "seed": "a"}, "seed is 'a'; it must be a whole number"),
    "half a seed": ({"density": 0.1, "seed": 1.5}, "seed is 1.5; it must be a whole number"),
    "custom distribution": ({"density": 0.1, "distribution": lambda s, d: {s[0].name: 7.0}}, r"not in \(0, 1\]"),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("options", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_change_nothing(options: dict, message: str, inplace: bool) -> None:
    model = SmallNet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = {path: sorted(vars(m)) for path, m in model.named_modules()}
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        sparsify(model, **options, inplace=inplace)
    assert type(model) is SmallNet
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert attributes == {path: sorted(vars(m)) for path, m in model.named_modules()}
    assert torch.equal(state, torch.get_rng_state())


def test_numbers_of_numpy_are_numbers() -> None:
    model = sparsify(SmallNet(), np.float32(0.25), seed=np.int64(3), method=RigL(np.int64(2), np.float64(0.5)))
    assert model.updater.nonzeros == sparsify(SmallNet(), 0.25).updater.nonzeros
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.updater.attach(optimizer, total_steps=np.int64(100))
    model.load_state_dict(model.state_dict())
    for steps in (1e3, True, "100"):
        with pytest.raises(ValueError, match=r"total_steps is .*; it must be a whole number \(an int\) of at least 1"):
            sparsify(SmallNet(), 0.5).updater.attach(optimizer, total_steps=steps)


def test_bad_models() -> None:
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, not str"):
        sparsify("resnet18", 0.1)
    with pytest.raises(ValueError, match="nothing to mask"):
        sparsify(nn.Sequential(nn.BatchNorm1d(3)), 0.1)
    sparse = sparsify(SmallNet(), 0.5)
    with pytest.raises(ValueError, match="sparse already"):
        sparsify(sparse, 0.5)
    with pytest.raises(ValueError, match="takes the model that sparsify"):
        fold(SmallNet())
    with pytest.raises(ValueError, match="it is inside this Sequential, at '0'"):
        fold(nn.Sequential(sparse))
    with pytest.raises(ValueError, match="no captured graph"):
        graph_table(SmallNet())
    taken = SmallNet()
    taken.updater = 3
    with pytest.raises(ValueError, match="attribute 'updater'"):
        sparsify(taken, 0.5)


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 3)])
def test_inputs_that_do_not_fit_name_the_node(shape: tuple) -> None:
    with pytest.raises(ValueError, match=r"do not fit the model, at node 'masked_conv1', module 'conv1'"):
        flop_report(sparsify(SmallNet(), 0.5), shape)
    with pytest.raises(ValueError, match="do not fit the model, at module 'conv1'"):
        flop_report(SmallNet(), shape)
    with pytest.raises(TypeError, match="must be a tensor, a tuple of arguments"):
        flop_report(SmallNet(), "1x3x8x8")


def test_bad_attachments() -> None:
    model = sparsify(SmallNet(), 0.5)
    good = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="do not hold 3 of 3 masked weights"):
        model.updater.attach(torch.optim.SGD(SmallNet().parameters(), 0.1), total_steps=1000)
    with pytest.raises(ValueError, match=r"do not hold 2 of 3 masked weights: conv2.weight, fc.weight"):
        model.updater.attach(torch.optim.SGD(model.conv1.parameters(), 0.1), total_steps=1000)
    for total in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="whole number"):
            model.updater.attach(good, total_steps=total)
    with pytest.raises(ValueError, match="No update would ever run"):
        model.updater.attach(good, total_steps=100)
    with pytest.raises(ValueError, match="same optimizer twice"):
        model.updater.attach(good, good, total_steps=1000)
    with pytest.raises(ValueError, match=r"takes torch.optim optimizers, one after the other, not int"):
        model.updater.attach(3, total_steps=1000)
    assert not good._optimizer_step_pre_hooks
    model.updater.attach(good, total_steps=1000)
    with pytest.raises(RuntimeError, match=r"call updater.detach"):
        model.updater.attach(good, total_steps=1000)


@pytest.mark.parametrize(
    "options", [{"interval": 0}, {"interval": 1.5}, {"drop_fraction": 1}, {"drop_fraction": 0}, {"end_fraction": 2}]
)
def test_bad_methods(options: dict) -> None:
    with pytest.raises(ValueError, match="must"):
        RigL(**options)
    assert isinstance(RigL(), Method)


def total(layer: LayerState) -> torch.Tensor:
    return layer.weight.sum()


def forgot_to_return(layer: LayerState) -> None:
    layer.weight.abs()


def logarithm(layer: LayerState) -> torch.Tensor:
    return (layer.weight + layer.gradient).log()


BAD_SCORES = {
    total: r"returned \(\) and torch.float32",
    forgot_to_return: "returned None",
    logarithm: "returned NaN",
}


@pytest.mark.parametrize("which", ["drop_score", "growth_score"])
@pytest.mark.parametrize("score", BAD_SCORES, ids=lambda score: score.__name__)
def test_scores_that_are_none_are_named(score: Callable, which: str) -> None:
    rigl = RigL(interval=1)
    model = sparsify(SmallNet(), 0.5, method=replace(rigl, updates=replace(rigl.updates, **{which: score})))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.updater.attach(optimizer, total_steps=10)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"The score {score.__name__} {BAD_SCORES[score]} for .*weight"):
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if "running" not in key)


def test_bad_state_dicts() -> None:
    model = sparsify(SmallNet(), 0.5)
    before = {k: copy.deepcopy(v) for k, v in model.state_dict().items()}
    damaged = copy.deepcopy(model.state_dict())
    damaged["fc.weight_mask.mask"][0, 0] ^= True
    shaped = copy.deepcopy(model.state_dict())
    shaped["fc.weight_mask.mask"] = torch.ones(3, 3, dtype=torch.bool)
    typed = copy.deepcopy(model.state_dict())
    typed["fc.weight_mask.mask"] = torch.ones(10, 32)
    missing = copy.deepcopy(model.state_dict())
    del missing["fc.weight_mask.mask"]
    for state, message in (
        (missing, "the first is fc.weight"),
        (damaged, "its own count says"),
        (shaped, r"is \(3, 3\)"),
        (typed, "torch.float32"),
    ):
        state["conv1.weight"] = torch.zeros_like(state["conv1.weight"])
        with pytest.raises(ValueError, match=message):
            model.load_state_dict(state)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if isinstance(v, Tensor))


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 2.0) -> Tensor:
        x = self.linear(x)
        return (x if mask is None else x * mask) * scale


def test_optional_arguments_run_as_the_model_does() -> None:
    model = Optional()
    sparse, x = sparsify(model, 1.0), torch.ones(4)
    for options in ({}, {"mask": None, "scale": 2.0}, {"mask": x}, {"scale": 3.0}):
        assert torch.equal(sparse(x, **options), model(x, **options))
    with pytest.raises(ValueError, match=r"holds the case scale=2\.0"):  # whoever runs the graph itself is told
        fx.Interpreter(sparse).run(x, None, 3.0)


class Random(nn.Module):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.linear, self.source = nn.Linear(4, 4), source

    def forward(self, x: Tensor) -> Tensor:
        sources = {"torch": lambda: torch.rand(4), "python": random.random, "numpy": lambda: float(np.random.rand())}
        return self.linear(x) + sources[self.source]()


class Writing(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how, self.calls = nn.Linear(4, 4), how, []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "buffer":
            self.count.add_(1)
        elif self.how == "list":
            self.calls.append(1)
        else:
            self.seen = True
        return self.linear(x)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else x


TRAPS = [
    Random("torch"),
    Random("python"),
    Random("numpy"),
    Writing("buffer"),
    Writing("list"),
    Writing("new"),
    Branching(),
]


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("trap", TRAPS, ids=lambda t: f"{type(t).__name__} {getattr(t, 'source', getattr(t, 'how', ''))}")
def test_code_that_a_graph_would_freeze_stays_python(trap: nn.Module, root: bool) -> None:
    trap = copy.deepcopy(trap)
    model = trap if root else nn.Sequential(nn.Linear(4, 4), trap)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    before = copy.deepcopy(vars(trap))
    sparse = sparsify(model, 1.0)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[1:]
    assert vars(trap).keys() == before.keys()
    assert vars(trap).get("calls") == before.get("calls")
    path = "linear" if root else "1.linear"
    whole = getattr(trap, "how", "") == "buffer"  # writing a buffer in place is an operation like any other
    assert ("" if whole else path) in graphs(sparse)
    assert f"{path}.weight" in sparse.updater.masks
    x = torch.randn(3, 4)
    for _ in range(2):
        outputs = []
        for net in (model, sparse):
            torch.manual_seed(0), random.seed(0), np.random.seed(0)
            outputs.append(net(x))
        assert torch.equal(*outputs)
    assert getattr(trap, "count", 0) == (sparse if root else sparse[1]).state_dict().get("count", 0)
    twin = copy.deepcopy(sparse)
    assert twin.updater.masks.keys() == sparse.updater.masks.keys()


class Modes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.linear(x)
        return (x, self.head(x)) if self.training else x


def test_modes_have_their_own_graphs() -> None:
    sparse = sparsify(Modes().eval(), 1.0)
    assert not sparse.training
    assert len(sparse(torch.randn(1, 4))) == 1
    assert len(sparse.train()(torch.randn(1, 4))) == 2
    assert len(list(sparse.graph.nodes)) == len(list(sparse.eval().graph.nodes)) + 1
    assert set(sparse.updater.masks) == {"linear.weight", "head.weight"}
    compiled = torch.compile(sparse, backend="eager")
    assert isinstance(compiled.train()(torch.randn(1, 4)), tuple)
    assert isinstance(compiled.eval()(torch.randn(1, 4)), Tensor)


def test_tracing_is_an_analysis() -> None:
    model = SmallNet().eval()
    model.bn.train()
    before = {path: (m.training, sorted(vars(m))) for path, m in model.named_modules()}
    trace(model)
    assert before == {path: (m.training, sorted(vars(m))) for path, m in model.named_modules()}


class ReadsBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("std", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x / (self.std + 1e-5))


def test_buffers_are_read_when_the_graph_runs() -> None:
    model = ReadsBuffer()
    sparse, x = sparsify(model, 1.0), torch.randn(2, 4)
    for net in (model, sparse):
        net.std.fill_(5.0)
    assert torch.equal(model(x), sparse(x))


class WritesChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(4, 4)
        self.child.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.child.calls += 1
        return self.child(x)


def test_writing_to_a_child_is_noticed() -> None:
    model = WritesChild()
    sparse = sparsify(model, 1.0)
    assert model.child.calls == sparse.child.calls == 0
    sparse(torch.randn(1, 4)), sparse(torch.randn(1, 4))
    assert sparse.child.calls == 2
    assert list(graphs(sparse)) == ["child"]


class OwnAttention(nn.MultiheadAttention):
    """Inherits its forward: the weights are read by torch.nn's code."""


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = OwnAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def test_subclasses_that_inherit_forward_are_masked() -> None:
    sparse = sparsify(Attending(), 0.3, method="static")
    assert set(sparse.updater.masks) == {"attention.in_proj_weight", "attention.out_proj.weight"}
    optimizer = torch.optim.SGD(sparse.parameters(), 0.1)
    sparse.updater.attach(optimizer, total_steps=10)
    sparse(torch.randn(3, 2, 8)).sum().backward()
    optimizer.step()
    for name, mask in sparse.updater.masks.items():
        assert not sparse.get_parameter(name)[~mask].any()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("wrap", [nn.utils.spectral_norm])
def test_weights_that_hooks_make_are_listed(wrap: object) -> None:
    sparse = sparsify(nn.Sequential(wrap(nn.Linear(4, 4)), nn.Linear(4, 4)), 0.5)
    assert set(sparse.updater.masks) == {"1.weight"}
    assert all("unsupported" in reason for reason in sparse.updater.rules.values())
    assert sparse.updater.rules


def test_a_weight_that_its_parent_owns_too() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.weight = self.layer.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    sparse = sparsify(Shared(), 0.5)
    assert list(sparse.updater.masks) == [next(name for name, _ in sparse.named_parameters())] == ["weight"]
    assert set(flop_report(sparse, (1, 8)).coverage.values()) == {"masked"}


class ReadsChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.child.weight) if x.sum() > 0 else self.child(x)


def test_weights_that_python_code_reads_stay_sparse() -> None:
    sparse = sparsify(nn.Sequential(nn.Linear(8, 8), ReadsChild()), 0.3, method="static")
    optimizer = torch.optim.SGD(sparse.parameters(), 0.1)
    sparse.updater.attach(optimizer, total_steps=10)
    for _ in range(3):
        optimizer.zero_grad()
        sparse(torch.randn(64, 8)).square().sum().backward()
        optimizer.step()
        for name, mask in sparse.updater.masks.items():
            assert not sparse.get_parameter(name)[~mask].any()


@pytest.mark.parametrize("name", ["passes/__init__.py", "passes.py"])
def test_a_folder_of_ones_own_named_passes_is_said(name: str, tmp_path: Path) -> None:
    place = tmp_path / name
    place.parent.mkdir(exist_ok=True)
    place.touch()
    run = [sys.executable, "-c", "import sparsify"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert f"needs its own package `passes`, but Python finds {place} first" in done.stderr
