"""Every method: one suite over a table of them, given masks, bad options."""

import copy
import math
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import SmallNet
from test_updates import OPTIMIZERS, X, Y, assert_sparse, train
from torch import nn

from sparsify import GMP, NM, SET, SNFS, SNIP, Method, RigL, SRigL, Static, flop_report, fold, sparsify
from sparsify.methods.published import METHODS

TOTAL = 40  # steps; updates every 3 up to 30
TABLE: dict[str, Method] = {
    method.name: method
    for method in (
        Static(),
        SET(3),
        SNFS(3),
        RigL(3),
        RigL(3, redistribution="gradient"),
        RigL(3, redistribution="momentum"),
        RigL(3, layout="kernels"),
        RigL(3, layout="2x1"),
        RigL(3, layout="4x1"),
        SRigL(3),
        NM(2, 4, 3),
        GMP(3),
        GMP(3, scope="global"),
        SNIP(scope="layer"),
        SNIP(),
    )
}


def make(method: Method, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    density = None if method.layout.fixed else 0.3
    return sparsify(SmallNet().to(dtype), density, method=method, seed=seed)


def start(method: Method, make_optimizer: object = OPTIMIZERS["sgd"], seed: int = 0, total: int = TOTAL) -> tuple:
    model = make(method, seed)
    optimizer = make_optimizer(model.parameters())
    model.updater.attach(optimizer, total_steps=total)
    return model, optimizer


def assert_layout(model: nn.Module) -> None:
    """Counts are what the method promises, exactly."""
    method, goals, masks = model.updater.method, model.updater.goals, model.updater.masks
    targets = {name: goal.target for name, goal in goals.items()}
    counts = model.updater.nonzeros
    if method.name in ("set", "rigl", "rigl-struct", "rigl-2x1", "rigl-4x1", "nm", "static", "gmp", "snip-layer"):
        assert counts == targets
    elif method.name != "srigl":
        assert sum(counts.values()) == sum(targets.values())
        assert all(0 < n <= masks[name].numel() for name, n in counts.items())
    for name, mask in masks.items():
        if method.name == "rigl-struct":
            kernels = mask.flatten(2).sum(2) if mask.dim() > 2 else mask
            assert set(kernels.flatten().int().tolist()) <= {0, math.prod(mask.shape[2:])}
        if method.name in ("rigl-2x1", "rigl-4x1"):
            groups = mask.flatten(1).unflatten(0, (-1, int(method.layout.name[0])))
            assert (groups == groups[:, :1]).all()
        if method.name == "nm":
            groups = mask.movedim(1, -1).reshape(-1, 4).sum(1)
            assert (groups == 2).all()
        if method.name == "srigl":
            per_row = mask.flatten(1).sum(1)
            active = int((per_row > 0).sum())
            assert set(per_row.tolist()) <= {0, int(per_row.max())}
            assert targets[name] - active < counts[name] <= targets[name]


def test_the_table_is_complete() -> None:
    assert list(TABLE) == list(METHODS)


@pytest.mark.parametrize("method", TABLE.values(), ids=TABLE)
class TestEveryMethod:
    def test_invariants_at_every_step(self, method: Method) -> None:
        model, optimizer = start(method)
        first = {name: mask.clone() for name, mask in model.updater.masks.items()}

        def check(step: int) -> None:
            assert_sparse(model)
            if not method.prunes:
                assert_layout(model)

        train(model, [optimizer], TOTAL, check)
        assert_layout(model)
        assert any(not torch.equal(first[n], m) for n, m in model.updater.masks.items()) == (method.updates is not None)
        history = model.updater.history
        steps = list(method.updates.steps(TOTAL)) if method.updates else []
        assert [entry.step for entry in history] == [0, *steps]
        assert history[-1].nonzeros == model.updater.nonzeros

    def test_resume_is_bit_exact(self, method: Method) -> None:
        for at in (7, 9):  # between updates, and just after one
            model, optimizer = start(method)
            train(model, [optimizer], at)
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            twin = make(method, seed=5)
            twin.load_state_dict(saved[0])
            other = OPTIMIZERS["sgd"](twin.parameters())
            other.load_state_dict(saved[1])
            twin.updater.attach(other, total_steps=TOTAL)
            train(model, [optimizer], 13)
            train(twin, [other], 13)
            for key, value in model.state_dict().items():
                assert torch.equal(value, twin.state_dict()[key]), key
            assert twin.updater.history == model.updater.history

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_precisions(self, method: Method, dtype: torch.dtype) -> None:
        model = make(method, dtype=dtype)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        model.updater.attach(optimizer, total_steps=12)
        for _ in range(12):
            optimizer.zero_grad()
            F.cross_entropy(model(X.to(dtype)).float(), Y).backward()
            optimizer.step()
            assert_sparse(model)
        assert_layout(model)
        assert all(p.dtype == dtype for p in model.parameters())

    def test_copies(self, method: Method) -> None:
        model, optimizer = start(method)
        train(model, [optimizer], 4)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin.updater.nonzeros == model.updater.nonzeros
            other = OPTIMIZERS["sgd"](twin.parameters())
            twin.updater.attach(other, total_steps=TOTAL)
            assert twin.updater.step == 4
            train(twin, [other], 5, lambda step, twin=twin: assert_sparse(twin))

    @pytest.mark.parametrize("early", [0, 1])
    def test_nan_in_an_ordinary_step_changes_no_mask(self, method: Method, early: int) -> None:
        """Weights are NaN from then on, and an update meets them: it is counted and changes nothing."""
        if method.updates is None or method.updates.steps(TOTAL)[0] <= early:
            pytest.skip("no update, or none later than that")
        model, optimizer = start(method)
        update = method.updates.steps(TOTAL)[0]
        train(model, [optimizer], update - early - 1)
        before = copy.deepcopy(model.updater.masks)
        for step in range(early + 1):
            optimizer.zero_grad()
            (F.cross_entropy(model(X), Y) * (1.0 if step else torch.nan)).backward()
            optimizer.step()
        assert all(torch.equal(m, before[n]) for n, m in model.updater.masks.items())
        assert model.updater.nonzeros == {n: int(m.sum()) for n, m in before.items()}
        with pytest.warns(UserWarning, match="NaN"):
            assert model.updater.skipped_updates == 1

    def test_nan_changes_no_mask(self, method: Method) -> None:
        if method.updates is None or method.updates.dense_gradients != "updates":
            pytest.skip("goes by weights or averages")
        model, optimizer = start(method)
        update = method.updates.steps(TOTAL)[0]
        train(model, [optimizer], update - 1)
        before = copy.deepcopy(model.updater.masks)
        optimizer.zero_grad()
        (F.cross_entropy(model(X), Y) * torch.nan).backward()
        optimizer.step()
        assert all(torch.equal(m, before[n]) for n, m in model.updater.masks.items())
        with pytest.warns(UserWarning, match="NaN"):
            assert model.updater.skipped_updates == 1
        train(model, [optimizer], TOTAL - model.updater.step)
        assert_layout(model)  # SNIP has pruned at the next step after all

    def test_on_meta(self, method: Method) -> None:
        with torch.device("meta"):
            model = SmallNet()
        report = flop_report(sparsify(model, None if method.layout.fixed else 0.3, method=method), (1, 3, 8, 8))
        assert report.final_ratio < 0.7
        assert report.final_ratio <= report.exact_training_ratio <= 1


@pytest.mark.parametrize("name", ["zeros", "random", "gradient"])
def test_growth_initializations(name: str) -> None:
    model, optimizer = start(RigL(3, growth_init=name))
    train(model, [optimizer], 2)
    before = copy.deepcopy(model.updater.masks)
    sizes = {n: model.get_parameter(n).detach().norm() / model.updater.nonzeros[n] ** 0.5 for n in before}
    optimizer.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    gradients = {n: model.get_parameter(n).grad.clone() for n in before}
    optimizer.step()
    for n, mask in model.updater.masks.items():
        grown = model.get_parameter(n).detach()[mask & ~before[n]]
        if name == "zeros":
            assert not grown.any()
        elif name == "gradient" and grown.numel():
            assert (grown.sign() == -gradients[n][mask & ~before[n]].sign()).all()
            assert grown.abs().max() <= 0.0101 * sizes[n]
        elif grown.numel():
            assert (grown != 0).all()
            assert grown.abs().max() <= 1.01 * 3**0.5 * sizes[n]
    assert_sparse(model)


def test_lottery_ticket_and_masks_re_used() -> None:
    torch.manual_seed(0)
    initial = SmallNet()
    trained = sparsify(initial, 0.3, method=GMP(3))
    optimizer = OPTIMIZERS["sgd"](trained.parameters())
    trained.updater.attach(optimizer, total_steps=30)
    train(trained, [optimizer], 30)
    for weights, masks in ((initial, trained), (SmallNet(), trained.updater.masks)):
        ticket = sparsify(weights, masks=masks, method="static")
        assert ticket.updater.nonzeros == trained.updater.nonzeros
        for name, mask in trained.updater.masks.items():
            assert torch.equal(ticket.updater.masks[name], mask)
            expected = torch.where(mask, weights.get_parameter(name), 0)
            assert torch.equal(ticket.get_parameter(name), expected)
    ticket.updater.masks["fc.weight"].logical_not_()
    assert not torch.equal(ticket.updater.masks["fc.weight"], trained.updater.masks["fc.weight"])  # copies, not shared
    excluded = sparsify(SmallNet(), 0.3, "uniform", exclude=["fc.*"])
    again = sparsify(SmallNet(), masks=excluded, method="rigl")
    assert set(again.updater.masks) == {"conv2.weight"}


class Wider(SmallNet):
    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(16, 48, 3, stride=2, padding=1)
        self.fc = nn.Linear(48, 10)


def unpruned() -> nn.Module:
    return sparsify(SmallNet(), 0.3, method=GMP(3))


BAD_MASKS = {
    "nothing pruned yet": (unpruned, {"method": "static"}, "nothing is pruned yet"),
    "shape": (
        lambda: sparsify(Wider(), 0.3),
        {},
        r"first that does not fit is conv2.weight, of shape \(48, 16, 3, 3\)",
    ),
    "name": (lambda: {"head.weight": torch.ones(3, 3).bool()}, {}, "first that does not fit is head.weight"),
    "missing": (lambda: {"fc.weight": torch.ones(10, 32).bool()}, {}, "none for conv1.weight"),
    "empty": (lambda: {"conv1.weight": torch.zeros(16, 3, 3, 3).bool()}, {}, "keeps no weight"),
    "float": (lambda: {"fc.weight": torch.ones(10, 32)}, {}, "mask of fc.weight is torch.float32, not torch.bool"),
    "dense model": (SmallNet, {}, "neither masks nor zeros"),
    "density": (lambda: sparsify(SmallNet(), 0.3), {"density": 0.3}, "neither density nor flops"),
    "dense start": (lambda: sparsify(SmallNet(), 0.3), {"method": "gmp"}, "contradict: it starts dense"),
    "layout": (lambda: sparsify(SmallNet(), 0.3), {"method": "nm"}, "contradict: it draws masks of 2:4"),
}


@pytest.mark.parametrize(("masks", "options", "message"), BAD_MASKS.values(), ids=BAD_MASKS)
def test_bad_masks(masks: object, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparsify(SmallNet(), masks=masks(), **options)


BAD_OPTIONS = {
    "end before begin": (lambda: GMP(begin_fraction=0.8, end_fraction=0.5), "must be below end_fraction"),
    "drop fraction": (lambda: SET(drop_fraction=1.0), r"must lie in \(0, 1\)"),
    "groups of one": (lambda: NM(1, 1), "m is 1; it must be a whole number .* of at least 2"),
    "flops of a global budget": (
        lambda: sparsify(SmallNet(), flops=0.3, inputs=(1, 3, 8, 8), method=SNIP()),
        "cannot be met by method 'snip'",
    ),
    "n above m": (lambda: NM(5, 4), "n=5 is larger than m=4"),
    "fan-in above the layer's": (lambda: sparsify(SmallNet(), method=SRigL(fan_in=64)), "larger than the 27 inputs"),
    "no fan-in": (lambda: SRigL(fan_in=0), "whole number"),
    "ablation": (lambda: SRigL(ablation=1.5), r"must lie in \[0, 1\]"),
    "schedule": (lambda: RigL(drop_schedule="cosin"), "Did you mean 'cosine'"),
    "growth": (lambda: RigL(growth_init="zero"), "Did you mean 'zeros'"),
    "redistribution": (lambda: RigL(redistribution="grad"), "Did you mean 'gradient'"),
    "redistributed kernels": (lambda: RigL(redistribution="gradient", layout="kernels"), "needs layout='elements'"),
    "scope": (lambda: GMP(scope="model"), "known are layer, global"),
    "density of 2:4": (lambda: sparsify(SmallNet(), 0.3, method="nm"), "says how many weights are kept"),
    "nothing to cut": (lambda: sparsify(nn.Linear(3, 3), method="nm"), "cannot be cut into groups of 4"),
    "fold before pruning": (lambda: fold(sparsify(SmallNet(), 0.3, method="snip")), "Nothing is pruned yet"),
}


@pytest.mark.parametrize(("call", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_snip_before_any_batch() -> None:
    model, optimizer = start(SNIP())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"conv1.weight has no gradient, and method .snip. prunes"):
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    train(model, [optimizer], 1)
    assert_layout(model)


@pytest.mark.parametrize("method", [m for m in TABLE.values() if m.updates], ids=lambda m: m.name)
def test_a_frozen_layer_keeps_its_mask(method: Method) -> None:
    model = make(method)
    model.conv2.weight.requires_grad_(False)
    before = model.updater.masks["conv2.weight"].clone()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    model.updater.attach(optimizer, total_steps=12)
    train(model, [optimizer], 12, lambda step: assert_sparse(model))
    assert torch.equal(model.updater.masks["conv2.weight"], before)


def test_a_fan_in_by_hand() -> None:
    model = sparsify(SmallNet(), method=SRigL(fan_in=8))
    assert model.updater.nonzeros == {"conv1.weight": 16 * 8, "conv2.weight": 32 * 8, "fc.weight": 10 * 8}


def test_weights_that_cannot_have_the_layout_stay_dense_by_rule() -> None:
    report = flop_report(sparsify(SmallNet(), method="nm"), (1, 3, 8, 8))
    assert report.coverage["conv1.weight"] == "dense: its 3 inputs cannot be cut into groups of 4"


def test_a_method_that_lies_about_its_counts() -> None:
    lying = RigL(3)
    lying = replace(lying, updates=replace(lying.updates, plan=lambda layers, amount: [(1, 0) for _ in layers]))
    model, optimizer = start(lying)
    with pytest.raises(ValueError, match="need counts_vary=True"):
        train(model, [optimizer], 3)


def test_the_example_of_a_new_method() -> None:
    page = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
    block = next(b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "from dataclasses" in b)
    assert len(block.splitlines()) < 15
    scope: dict = {"sparsify": sparsify, "net": SmallNet()}
    exec(block, scope)
    method = next(v for v in scope.values() if isinstance(v, Method))
    model, optimizer = start(method, total=400)
    train(model, [optimizer], 110, lambda step: assert_sparse(model))
    assert len(model.updater.history) > 1


def test_the_clock_of_several_optimizers() -> None:
    model = make(GMP(3, scope="global"))
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model.conv1, model.conv2)] + [
        torch.optim.Adam([*model.fc.parameters(), *model.bn.parameters()])
    ]
    model.updater.attach(*optimizers, total_steps=TOTAL)
    train(model, optimizers, TOTAL, lambda step: assert_sparse(model))
    assert model.updater.nonzeros == {n: goal.target for n, goal in model.updater.goals.items()}
    steps = [entry.step for entry in model.updater.history]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("method", [SRigL(fan_in=1), NM(1, 2)], ids=["fan-in", "n:m"])
def test_grouped_transposed_convolutions_have_no_rows(method: Method) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))
            self.layer = nn.ConvTranspose2d(8, 8, 3, groups=2)
            self.plain = nn.ConvTranspose2d(8, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.plain(self.layer(F.conv_transpose2d(x, self.weight, groups=2)))

    model = sparsify(Functional(), method=method)
    assert set(model.updater.masks) == {"plain.weight"}
    assert "which of its dimensions are inputs is not known" in model.updater.rules["weight"]


@pytest.mark.parametrize("method", [RigL(3, redistribution="gradient"), SNFS(3)], ids=lambda m: m.name)
def test_a_layer_without_gradient_keeps_its_count(method: Method) -> None:
    model, optimizer = start(method)
    counts = model.updater.nonzeros
    for _ in range(3):
        optimizer.zero_grad()
        (F.cross_entropy(model(X), Y) * 0).backward()
        optimizer.step()
    assert model.updater.nonzeros == counts
    assert_layout(model)


@pytest.mark.parametrize(("method", "last"), [(RigL(5, end_fraction=0.55), 50), (GMP(1, end_fraction=0.29), 29)])
def test_ends_are_safe_from_float_error(method: Method, last: int) -> None:
    assert method.updates.steps(100)[-1] == last
