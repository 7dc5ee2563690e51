"""Updates of every method, worked by hand; SNIP by brute force; global pruning, shares and schedules."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SmallNet
from test_updates import X, Y, train
from torch import nn

from sparsify import GMP, NM, SET, SNFS, SNIP, Method, RigL, SRigL, sparsify
from sparsify.density.random_masks import uniform_numbers
from sparsify.methods.how_many import apportion, prune_global
from sparsify.methods.schedules import DROP_SCHEDULES, cubic
from sparsify.methods.scores import LayerState, weight

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
    "shared patterns": (  # pairs of outputs: of |w| sums 5 and 3 the second goes, and the highest |g| sum is 10
        RigL(**half, layout="2x1"),
        [[4, 1, 0, 0], [-1, -2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
        [[0, 1, 0, 2], [0, 0, 5, 2], [9, 0, 0, 0], [-1, 0, 0, 3]],
        [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
        [[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]],
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
    layers = [LayerState(str(i), w, w != 0, len(w), -(-len(w) // 4), 1, None, None, None, 1, 0) for i, w in enumerate(tensors)]
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
