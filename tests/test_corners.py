"""Corners: inputs that once gave wrong answers without a word, each kind with its siblings."""

import copy
import itertools
import os
import stat
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel

from sparsify import GMP, NM, RigL, flop_report, fold, graph_table, graphs, load_sparse, save_sparse, sparsify
from sparsify.saving.files import replacing

X, Y = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 4


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor = X, y: Tensor = Y) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


# Gradients: what several read, nobody writes to


class Reads(nn.Module):
    """Parameters that functions read."""

    def __init__(self, read: Callable[..., Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.read, self.names = read, list(shapes)
        self.fc = nn.Linear(8, 8)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.fc(x), *(getattr(self, name) for name in self.names))


SHARED = {
    "added": (lambda x, w: x + w, {"w": (1, 8)}),
    "added twice": (lambda x, w: x + w + w, {"w": (1, 8)}),
    "subtracted": (lambda x, w: x - w, {"w": (1, 8)}),
    "a sum of weights": (lambda x, a, b: F.linear(x, a + b), {"a": (6, 8), "b": (6, 8)}),
    "a difference of weights": (lambda x, a, b: F.linear(x, a - b), {"a": (6, 8), "b": (6, 8)}),
    "stacked": (lambda x, a, b: F.linear(x, torch.cat([a, b])), {"a": (6, 8), "b": (6, 8)}),
    "a bias of one row": (lambda x, w, b: torch.addmm(b, x, w), {"w": (8, 8), "b": (1, 8)}),
}


@pytest.mark.parametrize("name", SHARED)
def test_gradients_that_others_share_stay_theirs(name: str) -> None:
    read, shapes = SHARED[name]
    dense = Reads(read, **shapes)
    model = sparsify(dense, dict.fromkeys(shapes, 0.5), include=list(shapes), method="static")
    plain = copy.deepcopy(dense)
    plain.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(1, 8)
    for net in (model, plain):
        net(x).square().sum().backward()
    for key, parameter in plain.named_parameters():
        mask = model.updater.masks.get(key, torch.tensor(True))
        torch.testing.assert_close(model.get_parameter(key).grad, parameter.grad * mask, rtol=0, atol=1e-6)


class OwnConv(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight + self.shift, bias)


def test_a_convolution_of_somebodys_own_may_do_more_than_multiply() -> None:
    conv = OwnConv(3, 4, 3)
    conv.shift = nn.Parameter(torch.randn(4, 3, 3, 3))
    model = sparsify(nn.Sequential(conv, nn.Conv2d(4, 4, 1)), {"0.weight": 0.5}, method="static")
    model(torch.randn(1, 3, 5, 5)).sum().backward()
    assert (model[0].shift.grad != 0).all()


class Words(nn.Module):
    def __init__(self, mode: str = "") -> None:
        super().__init__()
        self.e = nn.EmbeddingBag(20, 8, sparse=True, mode=mode) if mode else nn.Embedding(20, 8, sparse=True)
        self.l = nn.Linear(8, 4)

    def forward(self, i: Tensor) -> Tensor:
        return self.l(self.e(i))


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)])
@pytest.mark.parametrize("mode", ["", "sum"])
@pytest.mark.parametrize("method", ["static", RigL(interval=3), "snfs"])
def test_sparse_gradients_of_embeddings_are_masked(make: Callable[..., Any], mode: str, method: Any) -> None:
    torch.manual_seed(0)
    model = sparsify(Words(mode), 0.5, include=["e.weight"], method=method)
    optimizer = make(model.parameters())
    model.updater.attach(optimizer, total_steps=400)
    indices = torch.tensor([[0, 1, 1, 7]])
    for _ in range(7):
        optimizer.zero_grad()
        model(indices).square().sum().backward()
        optimizer.step()
        assert not model.e.weight[~model.updater.masks["e.weight"]].any()
    assert int(model.updater.masks["e.weight"].sum()) == model.updater.nonzeros["e.weight"]


# Weights that are transformed before use


class Exponential(nn.Module):
    """f(0) = 1: nothing that is dropped would be 0."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.out = nn.Parameter(torch.randn(6, 8)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.linear(x, torch.exp(self.w)))


TRANSFORMED: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 16)), nn.ReLU(), nn.Linear(16, 4)),
    "by column": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 16), dim=1), nn.Linear(16, 4)),
    "spectral": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 16)), nn.Linear(16, 4)),
    "orthogonal": lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(8, 8)), nn.Linear(8, 4)),
    "cayley": lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(8, 8), orthogonal_map="cayley"), nn.Linear(8, 4)),
    "exponential": Exponential,
    "inside": lambda: nn.Sequential(Exponential(), parametrizations.weight_norm(nn.Linear(4, 16)), nn.Linear(16, 4)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_fold_computes_what_the_sparse_model_does(name: str, training: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense, x = TRANSFORMED[name](), torch.randn(4, 8)
    model = sparsify(dense, 0.15, method="static").train(training)
    before = copy.deepcopy(model.state_dict())
    plain = fold(model)
    assert plain.training is training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.eval(), plain.eval()
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(plain)(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(fold(model).eval()(x), model(x), rtol=0, atol=0)  # again: the first changed no class
    save_sparse(model, tmp_path / "net")
    if set(plain.state_dict()) != set(dense.state_dict()):
        with pytest.raises(ValueError, match="cannot be read into a dense model"):
            load_sparse(dense, tmp_path / "net")
    else:
        torch.testing.assert_close(load_sparse(dense, tmp_path / "net").eval()(x), model(x))
    other = load_sparse(sparsify(dense, 0.15, method="static", seed=1), tmp_path / "net").eval()
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_row_without_weights_gives_no_nan(name: str) -> None:
    torch.manual_seed(0)
    model = sparsify(TRANSFORMED[name](), 0.15, method=RigL(interval=2))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model.updater.attach(optimizer, total_steps=40)
    first = copy.deepcopy(model.updater.masks)
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert model.updater.skipped_updates == 0
    assert any(not torch.equal(mask, first[key]) for key, mask in model.updater.masks.items())


def test_a_real_nan_still_shows() -> None:
    model = sparsify(TRANSFORMED["weight norm"](), 0.3, method=RigL(interval=1))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model.updater.attach(optimizer, total_steps=40)
    (model(torch.randn(4, 8)).sum() * torch.nan).backward()
    assert model[0].parametrizations.weight.original1.grad.isnan().any()
    optimizer.step()
    with pytest.warns(UserWarning, match="NaN"):
        assert model.updater.skipped_updates == 1


# Copies and averages


def trained_average(average: Any, update: Callable[[Any, nn.Module], None], model: nn.Module, steps: int = 24) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.updater.attach(optimizer, total_steps=40)
    for _ in range(steps):
        step(model, optimizer)
        update(average, model)


@torch.no_grad()
def by_parameters(average: nn.Module, model: nn.Module) -> None:
    for mine, new in zip(average.parameters(), model.parameters(), strict=True):
        mine.lerp_(new, 0.1)


@torch.no_grad()
def by_floating_entries(average: nn.Module, model: nn.Module) -> None:
    new = model.state_dict()
    for key, value in average.state_dict().items():
        if value.dtype.is_floating_point:
            value.lerp_(new[key], 0.1)


@torch.no_grad()
def by_all_entries(average: nn.Module, model: nn.Module) -> None:
    new = model.state_dict()
    for key, value in average.state_dict().items():
        value.copy_(0.9 * value + 0.1 * new[key] if value.dtype.is_floating_point else new[key])


@pytest.mark.parametrize("update", [by_parameters, by_floating_entries])
def test_an_average_whose_masks_stay_behind_says_so(update: Callable[..., None]) -> None:
    model = sparsify(perceptron(), 0.2, method=RigL(interval=4))
    average = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trained_average(average, update, model)
        average.eval()
    assert any("let it copy the masks too" in str(w.message) for w in said)


def test_an_average_that_takes_the_masks_over_is_sparse() -> None:
    model = sparsify(perceptron(), 0.2, method=RigL(interval=4))
    average = copy.deepcopy(model)
    trained_average(average, by_all_entries, model)
    dense = perceptron()
    dense.load_state_dict(average.state_dict(), strict=False)
    torch.testing.assert_close(dense(X), average.eval()(X))
    assert average.updater.nonzeros == model.updater.nonzeros


def test_averaged_models() -> None:
    model = sparsify(perceptron(), 0.2, method=RigL(interval=4))
    average = AveragedModel(model, avg_fn=lambda a, b, n: 0.9 * a + 0.1 * b)
    trained_average(average, AveragedModel.update_parameters, model)
    dense = perceptron()
    dense.load_state_dict(average.module.state_dict(), strict=False)
    torch.testing.assert_close(dense(X), average.eval()(X))
    model = sparsify(perceptron(), 0.2, method=RigL(interval=4))
    average = AveragedModel(model, avg_fn=lambda a, b, n: 0.9 * a + 0.1 * b, use_buffers=True)
    trained_average(average, AveragedModel.update_parameters, model)
    with pytest.warns(UserWarning, match="use_buffers=True"):
        average.eval()


@pytest.mark.parametrize("method", [RigL(interval=5), GMP(interval=5), "static", "snfs"])
@pytest.mark.parametrize("optimizers", [1, 2])
def test_a_state_has_one_size_before_and_after_attach(method: Any, optimizers: int) -> None:
    model = sparsify(perceptron(), 0.2, method=method)
    before = {key: value.shape for key, value in model.state_dict().items()}
    groups = [model[0].parameters(), model[2].parameters()] if optimizers == 2 else [model.parameters()]
    made = [torch.optim.SGD(group, 0.1) for group in groups]
    model.updater.attach(*made, total_steps=400)
    for _ in range(12):
        for optimizer in made:
            step(model, optimizer)
    assert {key: value.shape for key, value in model.state_dict().items()} == before


# Optimizers


@pytest.mark.parametrize("order", list(itertools.permutations(["optimizer", "attach", "model"])), ids="-".join)
@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.Adam(p, 1e-2), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), torch.optim.Rprop]
)
@pytest.mark.parametrize("method", [RigL(interval=4), "snfs"])
def test_resuming_in_any_order_is_exact(order: tuple[str, ...], make: Callable[..., Any], method: Any) -> None:
    def fresh(seed: int) -> tuple[nn.Module, Any]:
        torch.manual_seed(seed)
        model = sparsify(perceptron(), 0.3, method=method, seed=seed)
        return model, make(model.parameters())

    one, first = fresh(0)
    one.updater.attach(first, total_steps=800)
    for _ in range(10):
        step(one, first)
    two, second = fresh(1)
    saved = copy.deepcopy((first.state_dict(), one.state_dict()))
    for what in order:
        if what == "optimizer":
            second.load_state_dict(copy.deepcopy(saved[0]))
        elif what == "model":
            two.load_state_dict(saved[1])
        else:
            two.updater.attach(second, total_steps=800)
    for _ in range(10):
        step(one, first)
        step(two, second)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert all(torch.equal(mask, two.updater.masks[name]) for name, mask in one.updater.masks.items())


class Custom(torch.optim.Optimizer):
    """An optimizer of somebody's own, whose state begins with a number of its own."""

    def __init__(self, params: Any, lr: float = 0.1, trust: float = 3.0) -> None:
        super().__init__(params, {"lr": lr, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["trust"] = torch.full_like(p, group["trust"])
                    p.add_(p.grad / state["trust"], alpha=-group["lr"])


STARTS = {
    "rprop": (lambda p: torch.optim.Rprop(p, lr=0.02), "step_size", 0.02),
    "adagrad": (lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.25), "sum", 0.25),
    "adamax": (torch.optim.Adamax, "exp_inf", 0.0),
    "adam": (torch.optim.Adam, "exp_avg_sq", 0.0),
    "custom": (Custom, "trust", 3.0),
    "custom with an option": (lambda p: Custom(p, trust=5.0), "trust", 5.0),
}


@pytest.mark.parametrize("name", STARTS)
def test_what_an_update_grows_begins_as_a_new_parameter_does(name: str) -> None:
    torch.manual_seed(0)
    make, key, value = STARTS[name]
    model = sparsify(perceptron(), 0.2, method=RigL(interval=3))
    optimizer = make(model.parameters())
    model.updater.attach(optimizer, total_steps=100)
    before = copy.deepcopy(model.updater.masks)
    for _ in range(3):
        step(model, optimizer)
    grown = model.updater.masks["0.weight"] & ~before["0.weight"]
    dropped = before["0.weight"] & ~model.updater.masks["0.weight"]
    state = optimizer.state[model[0].weight][key]
    assert grown.any()
    assert (state[grown] == value).all()
    assert not state[dropped].any()


def test_a_group_with_a_rate_of_0_keeps_its_topology() -> None:
    model = sparsify(perceptron(), 0.3, method=RigL(interval=2))
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    optimizer = torch.optim.SGD(groups, 0.1)
    model.updater.attach(optimizer, total_steps=100)
    before = copy.deepcopy(model.updater.masks)
    for _ in range(8):
        step(model, optimizer)
    same = {name: torch.equal(mask, before[name]) for name, mask in model.updater.masks.items()}
    assert same == {"0.weight": True, "2.weight": False}


def test_momentum_from_before_says_that_it_needs_attaching() -> None:
    net = perceptron()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    step(net, optimizer)
    model = sparsify(net, 0.3, method="static", inplace=True)
    step(model, optimizer)
    with pytest.warns(UserWarning, match=r"attach it: model\.updater\.attach"):
        output = model(X)
    used = [(layer.weight * mask, layer.bias) for layer, mask in zip(model[::2], model.updater.masks.values(), strict=True)]
    torch.testing.assert_close(output, F.linear(F.linear(X, *used[0]).relu(), *used[1]))


def test_scores_draw_random_numbers_in_one_order() -> None:
    rigl = RigL(interval=2)
    mine = replace(rigl, name="mine", updates=replace(rigl.updates, growth_score=lambda s: torch.rand_like(s.weight)))
    results = []
    for _ in range(3):
        torch.manual_seed(0)
        model = sparsify(nn.Sequential(*[nn.Linear(96 + i, 97 + i) for i in range(8)]), 0.5, method=mine)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        model.updater.attach(optimizer, total_steps=100)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(4, 96)).sum().backward()
            optimizer.step()
        results.append(b"".join(m.numpy().tobytes() for m in model.updater.masks.values()))
    assert len(set(results)) == 1


def test_masks_in_shared_memory_are_spoken_of() -> None:
    model = sparsify(perceptron(), 0.2, method=RigL(interval=5)).share_memory()
    with pytest.warns(UserWarning, match="Hogwild"):
        model.updater.attach(torch.optim.SGD(model.parameters(), 0.1), total_steps=100)


@pytest.mark.parametrize(("before", "after"), [((5, 20), (50, 1000)), ((50, 1000), (5, 20)), ((50, 1000), (500, 2000))])
def test_another_schedule_in_a_state_never_crashes(before: tuple[int, int], after: tuple[int, int]) -> None:
    one, two = (sparsify(perceptron(), 0.3, method=GMP(interval=interval)) for interval, _ in (before, after))
    one.updater.attach(torch.optim.SGD(one.parameters(), 0.1), total_steps=before[1])
    optimizer = torch.optim.SGD(two.parameters(), 0.1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        two.load_state_dict(one.state_dict())
        assert not two.updater.pruned_all
        two.updater.attach(optimizer, total_steps=after[1])
    assert any("interval" in str(w.message) for w in said)
    step(two, optimizer)


# Names


class Gate(nn.Module):
    def __init__(self, **named: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        for name, value in named.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@pytest.mark.parametrize("value", [nn.Dropout(0.5), nn.Buffer(torch.ones(8, 8)), 3.0], ids=["child", "buffer", "number"])
@pytest.mark.parametrize("inplace", [True, False])
def test_a_place_that_is_taken_is_refused_by_name(value: Any, inplace: bool) -> None:
    net = nn.Sequential(nn.Linear(8, 8), Gate(weight_mask=value))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"1 has an attribute 'weight_mask'.*exclude=\['1.weight'\]"):
        sparsify(net, 0.5, method="static", inplace=inplace)
    assert type(net[0]) is nn.Linear
    assert type(net) is nn.Sequential
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert list(sparsify(net, 0.5, exclude=["1.weight"]).updater.masks) == ["0.weight"]


class Named(nn.Module):
    def __init__(self, **named: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        for name, value in named.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


OURS = (
    "_graphs",
    "_forwards",
    "_arguments",
    "_through",
    "meta",
    "shape_env",
    "graph",
    "code",
    "_deepcopy_hooks",
    "_layers",
)


@pytest.mark.parametrize("name", [*OURS, "keeps_graph", "mask", "masks", "attended", "read", "_masked", "my_hooks"])
@pytest.mark.parametrize("value", [3.0, nn.Linear(8, 8)], ids=["number", "child"])
def test_attributes_with_our_names_keep_their_values(name: str, value: Any) -> None:
    net = Named(**{name: value}).eval()
    model = sparsify(net, 1.0, method="static").eval()
    x = torch.randn(2, 8)
    assert torch.equal(model(x), net(x))
    assert isinstance(getattr(copy.deepcopy(model), name), type(value))
    assert torch.equal(fold(sparsify(net, 0.5, method="static"))(x).isfinite(), torch.ones(2, 8, dtype=torch.bool))


@pytest.mark.parametrize("word", ["class", "in", "None", "lambda", "import"])
def test_words_of_python_are_names_too(word: str) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleDict({word: nn.Linear(8, 3), "box": nn.Linear(8, 4)})

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.heads[word](x), self.heads["box"](x)

    net, x = Heads().eval(), torch.randn(2, 8)
    model = sparsify(net, 1.0).eval()
    assert list(model.updater.masks) == [f"heads.{word}.weight", "heads.box.weight"]
    assert all(torch.equal(a, b) for a, b in zip(model(x), net(x), strict=True))
    assert flop_report(model, (2, 8)).dense_macs == 2 * 8 * 7


# Layers that change after sparsify


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


def test_surgery_that_a_graph_cannot_follow_names_the_way_out() -> None:
    model = sparsify(nn.Sequential(Block(), Block()), 0.5, method="static").eval()
    del model[0].bn
    with pytest.raises(RuntimeError, match=r"0\.bn was there when sparsify.*fold.*blocks"):
        model(torch.randn(1, 3, 8, 8))


def test_a_forward_that_is_replaced_later_runs() -> None:
    model, x = sparsify(nn.Sequential(Block(), Block()), 0.5, method="static").eval(), torch.randn(1, 3, 8, 8)
    model[1].forward = lambda x: x
    torch.testing.assert_close(model(x), model[0](x))


def test_layers_that_are_fused_later_run() -> None:
    model, x = sparsify(nn.Sequential(Block(), Block()), 0.5, method="static").eval(), torch.randn(1, 3, 8, 8)
    before = model(x)
    for block in (model[0], model[1]):
        block.conv = nn.utils.fusion.fuse_conv_bn_eval(block.conv, block.bn)
        del block.bn
        block.forward = block.conv.forward
    torch.testing.assert_close(model(x), before)


# Counting and views


@pytest.mark.parametrize(
    ("read", "out_dim"),
    [
        (lambda x, w: x @ w, 1),
        (lambda x, w: torch.mm(x, w), 1),
        (lambda x, w: (w @ x.t()).t(), 0),
        (lambda x, w: x @ w.t(), 0),
        (lambda x, w: x @ w.T, 0),
        (lambda x, w: torch.addmm(torch.ones(1, 8), x, w), 1),
        (F.linear, 0),
    ],
)
def test_dead_outputs_of_a_weight_that_functions_read(read: Callable[..., Tensor], out_dim: int) -> None:
    for dim in (0, 1):
        mask = torch.ones(8, 8, dtype=torch.bool)
        mask.movedim(dim, 0)[:3] = False
        model = sparsify(Reads(read, w=(8, 8)), masks={"w": mask}, exclude=["fc.*"], method="static")
        row = next(layer for layer in flop_report(model, (2, 8)).layers if layer.name == "w")
        assert row.dead_outputs == (3 if dim == out_dim else 0)


def test_numbers_of_any_size_are_printed() -> None:
    size = 1 << 20
    report = str(flop_report(nn.Linear(size, size, device="meta"), (size, size)))
    assert "1.153 E of 1.153 E MACs" in report


@pytest.mark.parametrize("shapes", [(8, 0), (0, 4)])
def test_weights_without_elements_stay_dense(shapes: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of initializing nothing
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(4, 0))
    model = sparsify(net, 0.5)
    assert model.updater.rules == {"2.weight": "it has no elements"}
    assert flop_report(model, (1, 8)).dense_macs == 64 + 32


def test_every_use_of_a_tied_weight_is_marked() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    net[2].weight = net[0].weight
    lines = graph_table(sparsify(net, 0.5), (1, 8)).splitlines()
    assert sum(line.startswith("* ") for line in lines) == 3


def test_a_layer_that_is_never_called_is_called_that() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    coverage = flop_report(sparsify(Spare(), 0.5), (1, 8)).coverage
    assert coverage == {"used.weight": "masked", "spare.weight": "dense: its layer is not called"}


# Bad input says what to do


class Convolution(nn.Conv2d):
    """As detection libraries have them: a convolution with Python code around."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


def test_convolutions_of_other_libraries_are_masked() -> None:
    model = sparsify(nn.Sequential(Convolution(3, 8, 3), nn.ReLU(), Convolution(8, 4, 3)), 0.5, method="static")
    assert list(model.updater.masks) == ["0.weight", "2.weight"]
    assert {layer.op for layer in flop_report(model, (1, 3, 9, 9)).layers} == {"conv"}


def test_zeros_that_cannot_be_masked_are_named() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.out = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x @ self.w if x.sum() > 0 else x @ self.w.t())

    net = Branch()
    with torch.no_grad():
        net.w[:, :6] = 0
        net.out.weight[:, ::2] = 0
    with pytest.raises(ValueError, match=r"w has zeros, which training would fill.*include=\['w'\].*exclude=\['w'\]"):
        sparsify(net, masks=net, method="static")
    assert set(sparsify(net, masks=net, method="static", include=["w"]).updater.nonzeros.values()) == {16}
    assert list(sparsify(net, masks=net, method="static", exclude=["w"]).updater.masks) == ["out.weight"]


def test_a_tensor_for_a_density_and_a_pruned_model() -> None:
    with pytest.raises(ValueError, match=r"density\.item\(\)"):
        sparsify(perceptron(), torch.tensor(0.5))
    net = perceptron()
    prune.l1_unstructured(net[0], "weight", 0.5)
    prune.l1_unstructured(net[2], "weight", 0.5)
    with pytest.raises(ValueError, match=r"prune\.remove\(module, name\).*include="):
        sparsify(net, 0.5)
    for layer in (net[0], net[2]):
        prune.remove(layer, "weight")
    assert sparsify(net, masks=net, method="static").updater.nonzeros == {"0.weight": 256, "2.weight": 64}


# Files


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_of_any_file(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        save_sparse(sparsify(perceptron(), 0.5), tmp_path / "new")
        assert mode_of(tmp_path / "new") == 0o666 & ~umask
    finally:
        os.umask(before)
    (tmp_path / "new").chmod(0o640)
    save_sparse(sparsify(perceptron(), 0.5), tmp_path / "new")
    assert mode_of(tmp_path / "new") == 0o640


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "file", tmp_path / "link"
    link.symlink_to(target)
    for _ in range(2):  # dangling, then not
        save_sparse(sparsify(perceptron(), 0.5), link)
        assert link.is_symlink()
        assert target.is_file()
    assert sorted(p.name for p in target.parent.iterdir()) == ["file"]


def test_a_plot_is_whole_or_not_there(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = flop_report(sparsify(perceptron(), 0.5), (1, 16))
    place = tmp_path / "plot.png"
    place.write_text("old")
    with pytest.raises(ValueError, match="Format 'nonsense'"):
        report.plot(str(tmp_path / "plot.nonsense"))
    report.plot(str(place))
    assert place.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["plot.png"]


def test_tied_weights_stored_once_are_loaded(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.o = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.o.weight = self.e.weight

        def forward(self, i: Tensor) -> Tensor:
            return self.o(self.e(i))

    one, two = sparsify(Tied(), 0.5, seed=1), sparsify(Tied(), 0.5, seed=2)
    safetensors.save_model(one, str(tmp_path / "tied"))
    safetensors.load_model(two, str(tmp_path / "tied"))
    assert all(torch.equal(mask, two.updater.masks[name]) for name, mask in one.updater.masks.items())
    assert one.updater.masks
    assert graphs(two)


# What a review found


def test_a_call_with_other_parameters_leaves_them_alone() -> None:
    model, source, teacher = sparsify(perceptron(), 0.3), sparsify(perceptron(), 0.3, seed=1), perceptron()
    model.load_state_dict(source.state_dict())
    before = copy.deepcopy(teacher.state_dict())
    functional_call(model, dict(teacher.named_parameters()), (X,))
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_pruning_happens_while_rates_warm_up() -> None:
    model = sparsify(perceptron(), 0.2, method="snip-layer")
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    optimizer = torch.optim.SGD(groups, 0.1)
    model.updater.attach(optimizer, total_steps=100)
    step(model, optimizer)
    assert all(density < 1 for density in model.updater.densities.values())


OTHER_USES = {
    "of another weight": lambda x, v, u, g: F.linear(x, v * g) + F.linear(x, u * g),
    "of an activation": lambda x, v, u, g: F.linear(x, v * g) + u.sum() + g.t(),
    "of a product of both": lambda x, v, u, g: F.linear(x, v * g) * F.linear(x, u * g),
}


@pytest.mark.parametrize("name", OTHER_USES)
def test_a_parameter_beside_a_weight_keeps_the_gradient_of_its_other_uses(name: str) -> None:
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[0] = False
    dense = Reads(OTHER_USES[name], v=(4, 8), u=(4, 8), g=(4, 1))
    model = sparsify(dense, masks={"v": mask}, exclude=["fc.*", "u", "g"], method="static")
    dense.load_state_dict(model.state_dict(), strict=False)
    for net in (model, dense):
        net(torch.ones(2, 8)).square().sum().backward()
    torch.testing.assert_close(model.g.grad, dense.g.grad)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own
@pytest.mark.parametrize("training", [True, False])
def test_transformed_weights_have_forward_derivatives(training: bool) -> None:
    model, x = sparsify(TRANSFORMED["exponential"](), 0.5, method="static").train(training), torch.randn(4, 8)
    parameters = dict(model.named_parameters())
    ones = {name: torch.ones_like(p) for name, p in parameters.items()}
    _, tangent = torch.func.jvp(lambda p: functional_call(model, p, (x,)).sum(), (parameters,), (ones,))
    gradients = torch.func.grad(lambda p: functional_call(model, p, (x,)).sum())(parameters)
    torch.testing.assert_close(tangent, sum(g.sum() for g in gradients.values()))


def test_sparse_constants_stay_in_the_graph() -> None:
    class Neighbours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.adjacent = nn.Linear(8, 8), torch.eye(4).to_sparse()

        def forward(self, x: Tensor) -> Tensor:
            return torch.sparse.mm(self.adjacent, self.fc(x))

    assert list(graphs(sparsify(Neighbours(), 0.5))) == [""]


def test_a_gain_of_0_comes_back_after_folding() -> None:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v, self.g, self.out = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.zeros(4, 1)), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.linear(x, (self.v - self.v.mean()) * (1 + self.g) * self.g))

    model, x = sparsify(Gain(), {"v": 0.5}, method="static").eval(), torch.randn(3, 8)
    with torch.no_grad():
        model.g[1] = 1
    plain = fold(model)
    with torch.no_grad():
        model.g[0] = plain.g[0] = 2
    torch.testing.assert_close(plain(x), model(x))


def test_folding_on_the_meta_device() -> None:
    with torch.device("meta"):
        net = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 6))
    assert fold(sparsify(net, 0.5, method="static"))[1].weight.is_meta


def test_dead_outputs_without_an_updater() -> None:
    mask = torch.ones(32, 16, dtype=torch.bool)
    mask[:3] = False
    model = sparsify(perceptron(), masks={"0.weight": mask}, exclude=["2.*"], method="static")
    model.updater.remove()
    assert [layer.dead_outputs for layer in flop_report(model, (1, 16)).layers] == [3, 0]


def test_asking_an_optimizer_leaves_no_trace() -> None:
    model, seen = sparsify(perceptron(), 0.3, method=RigL(interval=1)), []
    optimizer = torch.optim.Adagrad(model.parameters(), initial_accumulator_value=0.5)
    model.updater.attach(optimizer, total_steps=100)
    handle = register_optimizer_step_post_hook(lambda o, a, k: seen.append(o))
    try:
        F.cross_entropy(model(X), Y).backward()
        state = torch.get_rng_state()
        with torch.device("meta"):
            optimizer.step()
    finally:
        handle.remove()
    assert seen == [optimizer]
    assert torch.equal(torch.get_rng_state(), state)


def test_pictures_without_an_ending_and_pipes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = flop_report(sparsify(perceptron(), 0.5), (1, 16))
    report.plot(str(tmp_path / "figure"))
    assert (tmp_path / "figure.png").is_file()
    read, write = os.pipe()
    with replacing(f"/dev/fd/{write}") as place:
        place.write_text("through")
    os.close(write)
    assert os.read(read, 100) == b"through"
    os.close(read)


# Numbers of numpy, reports of what is nearly nothing


def test_counts_of_numpy_are_saved() -> None:
    model = sparsify(nn.Sequential(nn.Linear(8, 8)), method=NM(np.int64(2), np.int64(4)))
    state = model.state_dict()
    model.load_state_dict(state)
    assert model.updater.nonzeros == {"0.weight": 32}


def test_a_plot_of_no_layers(tmp_path: Path) -> None:
    flop_report(nn.Sequential(nn.ReLU()), (1, 4)).plot(str(tmp_path / "empty.png"))
    assert (tmp_path / "empty.png").stat().st_size > 0


def test_norms_over_many_dimensions_are_counted_with_the_rest() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4))
    assert sparsify(model, 0.5, inputs=(2, 4, 2, 2, 2, 4)).updater.nonzeros == {"0.weight": 8}


class ReadsOnly(nn.Module):
    """Python code that reads a matrix and multiplies by none."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.table = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.table.sum() if x.sum() > 0 else self.fc(x)


def test_what_python_code_reads_and_no_product_uses_is_dense() -> None:
    report = flop_report(sparsify(ReadsOnly(), 0.5), torch.ones(1, 4))
    assert report.coverage["table"] == "dense: read by Python code, and no product of it was seen"
    attention = sparsify(nn.MultiheadAttention(8, 2, add_bias_kv=True), 0.5)
    x = torch.randn(3, 2, 8)
    assert "reads it in its own way" in flop_report(attention, (x, x, x)).coverage["bias_k"]
