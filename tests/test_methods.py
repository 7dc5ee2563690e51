"""Every method: one suite over a table of them, updates worked by hand, SNIP by brute force, and given masks."""

import copy
import math
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SmallNet
from test_updates import OPTIMIZERS, X, Y, assert_sparse, train
from torch import nn

from sparsify import GMP, NM, SET, SNFS, SNIP, Method, RigL, SRigL, Static, flop_report, fold, sparsify
from sparsify.initialization import uniform_numbers
from sparsify.methods import METHODS
from sparsify.plans import apportion, prune_global
from sparsify.schedules import DROP_SCHEDULES, cubic
from sparsify.scores import LayerState, weight

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
    if method.name in ("set", "rigl", "rigl-struct", "nm", "static", "gmp", "snip"):
        assert counts == targets
    elif method.name != "srigl":
        assert sum(counts.values()) == sum(targets.values())
        assert all(0 < n <= masks[name].numel() for name, n in counts.items())
    for name, mask in masks.items():
        if method.name == "rigl-struct":
            kernels = mask.flatten(2).sum(2) if mask.dim() > 2 else mask
            assert set(kernels.flatten().int().tolist()) <= {0, math.prod(mask.shape[2:])}
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

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_every_optimizer(self, method: Method, name: str) -> None:
        model, optimizer = start(method, OPTIMIZERS[name], total=12)
        train(model, [optimizer], 12, lambda step: assert_sparse(model))
        assert_layout(model)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
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


# Updates by hand. One linear layer; weights, gradient and mask before -> mask after. Half of the active weights are dropped.
half = {"interval": 1, "drop_fraction": 0.5, "end_fraction": 1.0, "drop_schedule": "constant"}
WORKED = {
    "rigl": (RigL(**half), [[4, -1, 2, 3, 0, 0]], [[0, 0, 0, 0, -1, 5]], [[1, 1, 1, 1, 0, 0]], [[1, 0, 0, 1, 1, 1]]),
    "rigl on kernels": (  # 2 inputs and 2 outputs with kernels of 2: two active, |w| sums 3 and 4, |g| sums 3 and 5
        RigL(**half, layout="kernels"),
        [[[1, 2], [0, 0]], [[4, 0], [0, 0]]],
        [[[0, 0], [1, -2]], [[0, 0], [5, 0]]],
        [[[1, 1], [0, 0]], [[1, 1], [0, 0]]],
        [[[0, 0], [0, 0]], [[1, 1], [1, 1]]],
    ),
    "snip": (SNIP(scope="layer"), [[4, -1, 2, 3]], [[1, 9, -3, 1]], [[1, 1, 1, 1]], [[0, 1, 1, 0]]),
    "gmp": (GMP(1, end_fraction=1.0), [[4, -1, 2, 3]], [[9, 9, 9, 9]], [[1, 1, 1, 1]], [[1, 0, 0, 1]]),
    "2:4": (  # drops 1 and 2 of the first row, 2 of the second; each group is filled by gradient
        NM(2, 4, **half),
        [[1, 2, 0, 0, 5, 6, 0, 0]],
        [[0, 0, 3, -4, 9, 9, 9, 9]],
        [[1, 1, 0, 0, 1, 1, 0, 0]],
        [[0, 0, 1, 1, 1, 1, 0, 0]],
    ),
    "constant fan-in": (  # drops 1 and 2; both outputs are filled to a fan-in of 2
        SRigL(**half, ablation=0.0),
        [[1, 5, 0, 0], [0, 0, 2, 6]],
        [[0, 0, 0, 7], [3, 0, 0, 0]],
        [[1, 1, 0, 0], [0, 0, 1, 1]],
        [[0, 1, 0, 1], [1, 0, 0, 1]],
    ),
    "ablation": (  # 1 and 2 of the second output are dropped and both gradients are the first's: it keeps nothing
        SRigL(**half, ablation=0.5),
        [[5, 6, 0, 0], [1, 2, 0, 0]],
        [[0, 0, 7, 8], [0, 0, 1, 2]],
        [[1, 1, 0, 0], [1, 1, 0, 0]],
        [[1, 1, 1, 1], [0, 0, 0, 0]],
    ),
}


def layer_of(values: list) -> nn.Module:
    tensor = torch.tensor(values).float()
    outputs, inputs, *kernel = tensor.shape
    layer = nn.Conv1d(inputs, outputs, *kernel, bias=False) if kernel else nn.Linear(inputs, outputs, bias=False)
    layer.weight.data.copy_(tensor)
    return layer


@pytest.mark.parametrize(("method", "weights", "gradient", "before", "after"), WORKED.values(), ids=WORKED)
def test_worked_updates(method: Method, weights: list, gradient: list, before: list, after: list) -> None:
    kept = 0.5 if method.prunes else torch.tensor(before).float().mean().item()
    model = sparsify(nn.Sequential(layer_of(weights)), None if method.layout.fixed else kept, method=method)
    model.updater.masks["0.weight"].copy_(torch.tensor(before).bool())
    model[0].weight.data.copy_(torch.tensor(weights))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    model.updater.attach(optimizer, total_steps=2)
    while model.updater.step < method.updates.steps(2)[-1]:
        model[0].weight.grad = torch.tensor(gradient).float()
        optimizer.step()
        if not method.prunes:
            break
    assert model.updater.masks["0.weight"].int().tolist() == after


def two_layers(method: Method) -> tuple:
    """Two linear layers of 6 weights, 4 and 2 of them active."""
    model = nn.Sequential(nn.Linear(6, 1, bias=False), nn.Linear(6, 1, bias=False))
    model[0].weight.data = torch.tensor([[4.0, -1, 2, 3, 0, 0]])
    model[1].weight.data = torch.tensor([[5.0, 6, 0, 0, 0, 0]])
    model = sparsify(model, method=method, masks={f"{i}.weight": layer.weight != 0 for i, layer in enumerate(model)})
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    model.updater.attach(optimizer, total_steps=100)
    return model, optimizer


def test_worked_redistribution() -> None:
    """Mean |g| of active weights 1 and 3: of the 2 + 1 dropped, 0.75 and 2.25 grow, by largest remainder 1 and 2."""
    for method in (RigL(**half, redistribution="gradient"), RigL(**half, redistribution="momentum"), SNFS(**half)):
        model, optimizer = two_layers(method)
        model[0].weight.grad = torch.tensor([[1.0, 1, -1, 1, 0, 0.5]])
        model[1].weight.grad = torch.tensor([[-3.0, 3, 0, 2, 1, 4]])
        optimizer.step()
        masks = [model.updater.masks[f"{i}.weight"].int().tolist() for i in (0, 1)]
        # What was dropped are candidates too: the first layer's -1 and 2 have the gradients 1 and -1, the second's 5 has -3.
        assert masks == [[[1, 1, 0, 1, 0, 0]], [[1, 1, 0, 0, 0, 1]]], method.name


def test_worked_set() -> None:
    """The highest keyed random numbers among the candidates grow, after an ordinary step."""
    model, optimizer = two_layers(SET(**half))
    for layer in model:
        layer.weight.grad = torch.zeros(1, 6)
    optimizer.step()
    numbers = uniform_numbers(6, 0, "0.weight", 1)
    grown = sorted((1, 2, 4, 5), key=lambda i: -numbers[i])[:2]  # 0 and 3 are kept: |w| 4 and 3
    assert model.updater.masks["0.weight"].int().tolist() == [[int(i in (0, 3, *grown)) for i in range(6)]]


def test_snfs_hides_dense_gradients_from_the_optimizer_and_averages_them() -> None:
    model, optimizer = two_layers(SNFS(interval=50))
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(model[0].weight.grad.clone()))
    for _ in range(2):
        optimizer.zero_grad()
        model[0].weight.grad = torch.full((1, 6), 2.0)
        optimizer.step()
    assert seen[0].tolist() == [[2, 2, 2, 2, 0, 0]]
    torch.testing.assert_close(model.updater.momentum("0.weight"), torch.full((1, 6), 2 * (0.1 + 0.9 * 0.1)))
    assert all(mask.dense_gradient for mask in (model[0].weight_mask, model[1].weight_mask))


def test_snip_against_brute_force() -> None:
    for scope in ("layer", "global"):
        torch.manual_seed(0)
        dense = SmallNet()
        model = sparsify(dense, 0.2, method=SNIP(scope=scope))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model.updater.attach(optimizer, total_steps=10)
        targets = {name: goal.target for name, goal in model.updater.goals.items()}
        F.cross_entropy(dense(X), Y).backward()
        scores = {n: (dense.get_parameter(n) * dense.get_parameter(n).grad).abs().flatten().tolist() for n in targets}
        ranked = sorted(((s, n, i) for n in scores for i, s in enumerate(scores[n])), reverse=True)
        keep = (
            set(ranked[: sum(targets.values())])
            if scope == "global"
            else {x for n in targets for x in [r for r in ranked if r[1] == n][: targets[n]]}
        )
        train(model, [optimizer], 1)
        for name, mask in model.updater.masks.items():
            expected = [(s, name, i) in keep for i, s in enumerate(scores[name])]
            assert mask.flatten().tolist() == expected
            stays = mask.clone()
            assert torch.equal(model.get_parameter(name)[stays], dense.get_parameter(name)[stays])  # no step was taken


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 50)), min_size=1, max_size=20), st.floats(0, 1))
def test_apportion(pairs: list, share: float) -> None:
    shares, room = [s for s, _ in pairs], [n for _, n in pairs]
    total = int(share * sum(room))
    parts = apportion(total, shares, room)
    assert sum(parts) == total
    assert all(0 <= part <= n for part, n in zip(parts, room, strict=True))
    assert parts == apportion(total, shares, room)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(0, 1000), st.floats(0.05, 1))
def test_global_pruning_is_one_threshold(sizes: list, seed: int, reached: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(n, generator=generator) for n in sizes]
    layers = [
        LayerState(str(i), w, w != 0, len(w), -(-len(w) // 4), 1, None, None, None, 1, 0) for i, w in enumerate(tensors)
    ]
    plan = prune_global(weight, layers, reached)
    total = sum(math.floor(reached * (layer.nonzeros - layer.target) + 1e-6) for layer in layers)
    assert sum(drop for drop, _ in plan) == min(total, sum(sizes) - len(sizes))
    for (drop, grow), n in zip(plan, sizes, strict=True):
        assert 0 <= drop < n
        assert grow == 0
    dropped = [w.abs().sort().values[:drop] for w, (drop, _) in zip(tensors, plan, strict=True)]
    kept = [w.abs().sort().values[drop:-1] for w, (drop, _) in zip(tensors, plan, strict=True)]  # without the reserved
    if sum(len(d) for d in dropped) and sum(len(k) for k in kept):
        assert torch.cat(dropped).max() <= torch.cat(kept).min()


def test_published_points_of_the_schedules() -> None:
    expected = {
        "cosine": (0.3, 0.15, 0.0),
        "constant": (0.3,) * 3,
        "linear": (0.3, 0.15, 0),
        "inverse_power": (0.3, 0.0375, 0),
    }
    for name, values in expected.items():
        assert [DROP_SCHEDULES[name](0.3, t, 100) for t in (0, 50, 100)] == pytest.approx(values)
    # Zhu & Gupta, equation 1, from t0 = 100 to t1 = 500.
    points = {0: 0, 100: 0, 200: 1 - 0.75**3, 300: 0.875, 400: 1 - 0.25**3, 500: 1, 900: 1}
    assert [cubic(t, 100, 500) for t in points] == pytest.approx(list(points.values()))


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


BAD_MASKS = {
    "shape": (
        lambda: sparsify(Wider(), 0.3),
        {},
        r"first that does not fit is conv2.weight, of shape \(48, 16, 3, 3\)",
    ),
    "name": (lambda: {"head.weight": torch.ones(3, 3).bool()}, {}, "first that does not fit is head.weight"),
    "missing": (lambda: {"fc.weight": torch.ones(10, 32).bool()}, {}, "none for conv1.weight"),
    "empty": (lambda: {"conv1.weight": torch.zeros(16, 3, 3, 3).bool()}, {}, "keeps no weight"),
    "float": (lambda: {"fc.weight": torch.ones(10, 32)}, {}, "takes a model that sparsify"),
    "dense model": (SmallNet, {}, "takes a model that sparsify"),
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
    with pytest.raises(RuntimeError, match=r"conv1.weight has no gradient, by which method 'snip-global' prunes"):
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


def test_the_readme_example_of_a_new_method() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    block = next(b for b in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "from dataclasses" in b)
    assert len(block.splitlines()) < 15
    scope: dict = {}
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
