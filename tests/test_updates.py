"""RigL updates: worked by hand, at the right steps, with any optimizer, and nothing else moves."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SmallNet
from torch import Tensor, nn

from sparsify import SNFS, RigL, Static, sparsify
from sparsify.methods.selection import _select_by_numpy, _select_on_device, drop_and_grow, select

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 10


def bits(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


# weight, gradient, mask, k -> mask after
WORKED = {
    "drop the smallest, grow the largest gradient": (
        [5, -1, 3, 0, 0],
        [0, 0, 0, -2, 1],
        [1, 1, 1, 0, 0],
        1,
        [1, 0, 1, 1, 0],
    ),
    "dropped and regrown": ([5, -1, 3, 0, 0], [0, 9, 0, -2, 1], [1, 1, 1, 0, 0], 1, [1, 1, 1, 0, 0]),
    "ties drop the lowest index": ([1, 1, 1, 0], [0, 0, 0, 7], [1, 1, 1, 0], 1, [0, 1, 1, 1]),
    "ties grow the lowest index": ([1, 2, 0, 0], [0, 0, 3, -3], [1, 1, 0, 0], 1, [0, 1, 1, 0]),
    "all-zero gradient keeps the count": ([1, 2, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], 1, [1, 1, 0, 0]),
    "k = 0": ([1, 2, 0, 0], [9, 9, 9, 9], [1, 1, 0, 0], 0, [1, 1, 0, 0]),
    "the gradient of kept weights does not matter": ([9, 1, 0], [99, 0, 1], [1, 1, 0], 1, [1, 0, 1]),
}


@pytest.mark.parametrize(("weight", "gradient", "mask", "k", "after"), WORKED.values(), ids=WORKED)
def test_worked_steps(weight: list, gradient: list, mask: list, k: int, after: list) -> None:
    result = drop_and_grow(torch.tensor(weight).float(), torch.tensor(gradient).float(), bits(*mask), k, k)
    assert result.int().tolist() == after


def reference(scores: Tensor, k: int, among: Tensor) -> Tensor:
    order = sorted((i for i in range(len(scores)) if among[i]), key=lambda i: (-scores[i].item(), i))
    return torch.tensor([i in set(order[:k]) for i in range(len(scores))], dtype=torch.bool)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 200), st.integers(1, 6), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_select_on_every_path(n: int, levels: int, share: float, part: float, seed: int) -> None:
    """CPU and device paths agree with sorting, ties (few distinct levels) included."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (n,), generator=generator).float()
    among = torch.rand(n, generator=generator) <= share
    k = int(part * int(among.sum()))
    expected = reference(scores, k, among)
    assert torch.equal(select(scores, k, among), expected)
    if k:
        assert torch.equal(_select_on_device(scores, k, among, False), expected)
        assert torch.equal(_select_by_numpy(scores, k, among, False), expected)


@pytest.mark.parametrize("zeros", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("n", [40_000, 300_001, 9 * 65536])
def test_select_on_large_layers(n: int, dtype: torch.dtype, zeros: float) -> None:
    """The sampled bracket, its misses and 3x3 kernels that are zero off their centre change nothing."""
    generator = torch.Generator().manual_seed(n)
    tensor = torch.randn(n, generator=generator).to(dtype)
    tensor[torch.arange(n) % 9 != 4] *= 0 if zeros else 1
    among = torch.rand(n, generator=generator) < 0.5
    for k in (1, n // 100, int(among.sum())):
        for lowest in (False, True):
            cpu, *others = (f(tensor, k, among, lowest) for f in (select, _select_by_numpy, _select_on_device))
            assert all(torch.equal(cpu, other) for other in others)
            apart = torch.stack([tensor, tensor], 1)[:, 0]  # numbers that do not touch
            assert torch.equal(select(apart, k, among, lowest), cpu)
            assert int(cpu.sum()) == k


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [10, 100_000])
def test_select_more_than_there_are(n: int, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="fewer than 6"):
        select(torch.rand(n, dtype=dtype), 6, torch.arange(n) < 5)


@pytest.mark.parametrize("among_sample", [True, False])
@pytest.mark.parametrize("high", [True, False])
def test_select_where_the_sample_misleads(high: bool, among_sample: bool) -> None:
    """What is sampled, every 69th (68 shares a factor with the number), is unlike the rest: higher, lower, or not allowed."""
    n = 320_000
    sampled = torch.arange(n) % 69 == 0
    scores = torch.rand(n, generator=torch.Generator().manual_seed(0)) * torch.where(sampled, 10.0 if high else 0.1, 1.0)
    among = torch.ones(n, dtype=torch.bool) if among_sample else ~sampled
    for k in (1000, n // 2):
        assert torch.equal(select(scores, k, among), _select_on_device(scores, k, among, False))


def train(model: nn.Module, optimizers: list, steps: int, check: object = None) -> None:
    for step in range(1, steps + 1):
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        for optimizer in optimizers:
            optimizer.step()
        if check:
            check(step)


def attached(method: object = None, density: float = 0.3, total: int = 1000, make: object = None, **options: object) -> tuple:
    torch.manual_seed(0)
    model = sparsify(SmallNet(), density, method=method or RigL(interval=3), **options)
    optimizer = (make or (lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3)))(model.parameters())
    model.updater.attach(optimizer, total_steps=total)
    return model, optimizer


def assert_sparse(model: nn.Module) -> None:
    for name, mask in model.updater.masks.items():
        weight = model.get_parameter(name).detach()
        assert torch.equal(weight, torch.where(mask, weight, 0))
        assert int(mask.sum()) == model.updater.nonzeros[name]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
    "sgd nesterov foreach": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, weight_decay=1e-2),
    "adam amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, fused=True),
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.1),
    "adadelta": torch.optim.Adadelta,
    "asgd": torch.optim.ASGD,
    "rprop": torch.optim.Rprop,
    "adafactor": torch.optim.Adafactor,
}


NEW = {("adagrad", "sum"): 0.1, ("rprop", "step_size"): 0.01}  # what a new parameter gets; else 0


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_keeps_the_invariant(kind: str) -> None:
    model, optimizer = attached(make=OPTIMIZERS[kind])
    masks = {name: mask.clone() for name, mask in model.updater.masks.items()}
    counts = model.updater.nonzeros

    def check(step: int) -> None:
        assert_sparse(model)
        if step % 3 == 0:
            for name, mask in model.updater.masks.items():
                for key, state in optimizer.state[model.get_parameter(name)].items():
                    if isinstance(state, Tensor) and state.shape == mask.shape:
                        assert not state[masks[name] & ~mask].any()
                        assert (state[mask & ~masks[name]] == torch.tensor(NEW.get((kind, key), 0.0))).all()
                masks[name] = mask.clone()

    first = {name: mask.clone() for name, mask in masks.items()}
    train(model, [optimizer], 13, check)
    assert model.updater.nonzeros == counts
    assert any(not torch.equal(mask, first[name]) for name, mask in masks.items())


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is newer than this torch")
def test_an_optimizer_that_moves_zeros_is_corrected() -> None:
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10)), 0.3, method=RigL(3))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    optimizers = [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(others)]
    model.updater.attach(*optimizers, total_steps=100)
    train(model, optimizers, 10, lambda step: assert_sparse(model))


def test_lbfgs() -> None:
    model, optimizer = attached(make=lambda p: torch.optim.LBFGS(p, max_iter=4))
    masks = {name: mask.clone() for name, mask in model.updater.masks.items()}
    before = None

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    for step in range(1, 8):
        if step == 3:
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.step(closure)
        assert_sparse(model)
        if step == 3:
            assert not any(optimizer.state.values())
            for n, p in model.named_parameters():
                stay = masks[n] & model.updater.masks[n] if n in masks else torch.ones_like(p, dtype=torch.bool)
                assert torch.equal(p[stay], before[n][stay])
    assert any(not torch.equal(mask, masks[name]) for name, mask in model.updater.masks.items())


def test_updates_run_at_the_right_steps_and_replace_them() -> None:
    """t % interval == 0 and t < end_step; a replaced step moves nothing but what was dropped or grown."""
    model, optimizer = attached(RigL(interval=4, drop_fraction=0.5, end_fraction=0.75), total=24)  # end_step 18
    updated = []
    state = {}

    def snapshot() -> None:
        state["masks"] = {n: m.clone() for n, m in model.updater.masks.items()}
        state["weights"] = {n: p.detach().clone() for n, p in model.named_parameters()}
        state["optimizer"] = copy.deepcopy(optimizer.state_dict()["state"])

    def check(step: int) -> None:
        changed = {n: m ^ state["masks"][n] for n, m in model.updater.masks.items()}
        if any(c.any() for c in changed.values()):
            updated.append(step)
            for i, (n, p) in enumerate(model.named_parameters()):
                stays = ~changed[n] if n in changed else torch.ones_like(p, dtype=torch.bool)
                assert torch.equal(p[stays], state["weights"][n][stays])
                momentum = optimizer.state_dict()["state"][i]["momentum_buffer"]
                assert torch.equal(momentum[stays], state["optimizer"][i]["momentum_buffer"][stays])
        fraction = 0.25 * (1 + math.cos(math.pi * step / 18))
        for n, c in changed.items():
            assert int(c.sum()) <= 2 * math.floor(fraction * model.updater.nonzeros[n])
        snapshot()

    snapshot()
    train(model, [optimizer], 24, check)
    assert updated == [4, 8, 12, 16]


def test_gradients_are_dense_only_before_an_update() -> None:
    model, optimizer = attached(RigL(interval=3), total=100)
    dense_at = []

    for step in range(1, 10):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        mask = model.updater.masks["conv2.weight"]
        if model.conv2.weight.grad[~mask].any():
            dense_at.append(step)
        assert model.updater.gradients_are_dense == (step in (3, 6, 9))
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert norm.isfinite()
        optimizer.step()
    assert dense_at == [3, 6, 9]


@pytest.mark.parametrize("method", [RigL(2), SNFS(interval=2)], ids=lambda m: m.name)
def test_updates_of_a_model_in_evaluation_mode_see_dense_gradients(method: object) -> None:
    """As in fine-tuning with frozen statistics, or after a validation that forgot `train()`."""
    model, optimizer = attached(method)
    model.eval()
    train(model, [optimizer], 1)
    F.cross_entropy(model(X), Y).backward()
    outputs = model(X)
    for name, mask in model.updater.masks.items():
        assert model.get_parameter(name).grad[~mask].any() or mask.all()
    with torch.no_grad():
        for name, mask in model.updater.masks.items():
            model.get_parameter(name)[~mask] = torch.nan  # stays out, as ever in evaluation
    assert torch.equal(model(X), outputs)
    model.updater.detach(keep_step=True)
    assert torch.equal(model(X), outputs)


def test_grad_scaler() -> None:
    for fused in (False, True):
        model, optimizer = attached(make=lambda p, fused=fused: torch.optim.AdamW(p, fused=fused))
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        first = {n: m.clone() for n, m in model.updater.masks.items()}
        for _ in range(7):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(X), Y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            assert_sparse(model)
        assert any(not torch.equal(m, first[n]) for n, m in model.updater.masks.items())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_leaves_every_mask(bad: float) -> None:
    model, optimizer = attached()
    train(model, [optimizer], 2)
    before = copy.deepcopy(model.updater.masks)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    model.conv1.weight.grad.view(-1)[5] = bad
    optimizer.step()
    assert all(torch.equal(m, before[n]) for n, m in model.updater.masks.items())
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    with pytest.warns(UserWarning, match="NaN or infinite"):
        assert model.updater.skipped_updates == 1
    assert model.updater.skipped_updates == 1
    train(model, [optimizer], 3)
    assert any(not torch.equal(m, before[n]) for n, m in model.updater.masks.items())


def test_a_dense_layer_and_static_never_change() -> None:
    model, optimizer = attached(density={"conv1.weight": 1.0, "conv2.weight": 0.2})
    train(model, [optimizer], 7)
    assert model.updater.masks["conv1.weight"].all()
    model, optimizer = attached(Static())
    before = copy.deepcopy(model.updater.masks)
    train(model, [optimizer], 7, lambda step: assert_sparse(model))
    assert all(torch.equal(m, before[n]) for n, m in model.updater.masks.items())


def test_density_is_constant_over_hundreds_of_updates() -> None:
    model, optimizer = attached(RigL(interval=1, drop_fraction=0.5, end_fraction=1.0), total=400)
    counts = model.updater.nonzeros
    train(model, [optimizer], 350)
    assert_sparse(model)
    assert model.updater.nonzeros == counts


def test_channels_last_ties_and_strides() -> None:
    plain, optimizer = attached()
    torch.manual_seed(0)
    strided = sparsify(SmallNet(), 0.3, method=RigL(interval=3)).to(memory_format=torch.channels_last)
    other = torch.optim.SGD(strided.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    strided.updater.attach(other, total_steps=1000)
    for model, opt in ((plain, optimizer), (strided, other)):
        train(model, [opt], 2)
        opt.zero_grad()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        for n, m in model.updater.masks.items():
            model.get_parameter(n).data.copy_(m)  # everything ties
        opt.step()
    for name, mask in plain.updater.masks.items():
        assert torch.equal(mask, strided.updater.masks[name])


def test_several_optimizers_frozen_layers_and_a_second_phase() -> None:
    torch.manual_seed(0)
    model = sparsify(SmallNet(), 0.3, method=RigL(interval=3))
    model.conv1.weight.requires_grad_(False)
    frozen = model.updater.masks["conv1.weight"].clone()
    optimizers = [torch.optim.SGD(model.conv2.parameters(), 0.1), torch.optim.Adam(model.fc.parameters())]
    model.updater.attach(*optimizers, total_steps=100)
    train(model, optimizers, 4, lambda step: assert_sparse(model))
    assert torch.equal(model.updater.masks["conv1.weight"], frozen)
    assert model.updater.step == 4
    model.updater.detach()
    train(model, optimizers, 3)
    assert model.updater.step == 0
    model.conv1.weight.requires_grad_(True)
    second = torch.optim.SGD(model.parameters(), 0.1)
    model.updater.attach(second, total_steps=50)
    before = copy.deepcopy(model.updater.masks)
    train(model, [second], 3)
    assert any(not torch.equal(m, before[n]) for n, m in model.updater.masks.items())


def test_a_replaced_layer_is_noticed() -> None:
    model, optimizer = attached()
    model.fc = nn.Linear(32, 10)
    with pytest.raises(RuntimeError, match=r"fc.weight was replaced while the updater is attached"):
        train(model, [optimizer], 3)
    model.updater.detach()
    assert model.updater.replaced == ("fc.weight",)
    second = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match=r"fc.weight was masked, but its layer has been replaced"):
        model.updater.attach(second, total_steps=100)
    assert "fc.weight" not in model.updater.masks


def test_state_dict_round_trip_resumes_exactly() -> None:
    model, optimizer = attached()
    train(model, [optimizer], 5)
    saved, saved_optimizer = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, [optimizer], 5)

    torch.manual_seed(1)
    twin = sparsify(SmallNet(), 0.3, method=RigL(interval=3), seed=7)
    twin.load_state_dict(saved)
    second = torch.optim.SGD(twin.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    second.load_state_dict(saved_optimizer)
    twin.updater.attach(second, total_steps=1000)
    assert twin.updater.step == 5
    train(twin, [second], 5)
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, twin.state_dict()[name]), name

    dense = SmallNet()
    missing, unexpected = dense.load_state_dict(saved, strict=False)
    assert not missing
    assert all("mask" in key or key.startswith("updater.") for key in unexpected)
    twin.load_state_dict(dense.state_dict(), strict=False)
    assert_sparse(twin)


def test_a_loss_that_is_nan_everywhere() -> None:
    model, optimizer = attached(RigL(interval=2))
    before = copy.deepcopy(model.updater.masks)
    train(model, [optimizer], 1)
    optimizer.zero_grad()
    (F.cross_entropy(model(X), Y) * torch.nan).backward()
    optimizer.step()
    assert all(torch.equal(m, before[n]) for n, m in model.updater.masks.items())
    assert_sparse(model)
    with pytest.warns(UserWarning, match="NaN"):
        assert model.updater.skipped_updates == 1


def test_weights_initialized_anew_are_masked_by_attach() -> None:
    model = sparsify(SmallNet(), 0.3, method="static")
    for name in model.updater.masks:
        nn.init.normal_(model.get_parameter(name))
    model.updater.attach(torch.optim.SGD(model.parameters(), 0.1), total_steps=10)
    assert_sparse(model)
