"""What others write to weights, gradients and optimizer state: dropped weights stay 0 after every step all the same."""

import copy
import math
from collections.abc import Callable

import pytest
import ranks
import torch
import torch.nn.functional as F
from models import SmallNet
from test_updates import X, Y, assert_sparse, attached, train
from torch import Tensor, nn
from torch.multiprocessing import ProcessRaisedException
from torch.optim.swa_utils import AveragedModel, update_bn

from passes.masking.zeros import has_stray
from sparsify import GMP, SNFS, RigL, Static, sparsify


def assert_masked(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    assert_sparse(model)
    for name, mask in model.updater.masks.items():
        for value in optimizer.state[model.get_parameter(name)].values():
            assert not isinstance(value, Tensor) or value.shape != mask.shape or not value[~mask].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 3), (7, 11, 3, 3), (257, 401)])
@pytest.mark.parametrize(
    ("stray", "found"), [(0.0, False), (-0.0, False), (math.nan, False), (math.inf, False), (1e-40, True), (-3.0, True)]
)
def test_has_stray(stray: float, found: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of the first, the last or a transposed weight; kept weights may be anything."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    for at in (0, -1):
        mask.view(-1)[at] = False
        gradient = torch.where(mask, 2.0, 0.0).to(dtype)
        gradient.view(-1)[at] = stray
        assert has_stray(gradient, mask).item() is found
        assert has_stray(gradient.transpose(0, 1), mask.transpose(0, 1)).item() is found
        assert has_stray(gradient.transpose(0, 1), mask.transpose(0, 1).contiguous()).item() is found


# Optimizer state from elsewhere


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)])
def test_state_of_dense_pretraining(make: Callable, first: bool) -> None:
    dense = SmallNet()
    pretrained = make(dense.parameters())
    train(dense, [pretrained], 3)
    model = sparsify(dense, 0.3, method=RigL(100))
    optimizer = make(model.parameters())
    if first:
        model.updater.attach(optimizer, total_steps=1000)
        train(model, [optimizer], 2)
    optimizer.load_state_dict(pretrained.state_dict())
    if not first:
        model.updater.attach(optimizer, total_steps=1000)
    train(model, [optimizer], 3, lambda step: assert_masked(model, optimizer))


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)])
def test_going_back_to_the_best_weights_with_the_optimizer_as_it_is(make: Callable) -> None:
    model, optimizer = attached(RigL(2), make=make)
    train(model, [optimizer], 4)
    best = copy.deepcopy(model.state_dict())
    train(model, [optimizer], 9)
    model.load_state_dict(best)
    train(model, [optimizer], 5, lambda step: assert_masked(model, optimizer))


@pytest.mark.parametrize("make", [torch.optim.Rprop, lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.1)])
def test_state_that_moves_nothing_is_loaded_as_it_was(make: Callable) -> None:
    """It begins above 0 at dropped weights too, and a run that goes on must end as one that never stopped."""
    ends = []
    for stop in (False, True):
        model, optimizer = attached(make=make)
        train(model, [optimizer], 4)
        if stop:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            model, optimizer = attached(make=make)
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        train(model, [optimizer], 4, lambda step, model=model: assert_sparse(model))
        ends.append((model.state_dict(), optimizer.state_dict()["state"]))
    assert all(torch.equal(v, ends[1][0][k]) for k, v in ends[0][0].items())
    for i, state in ends[0][1].items():
        assert all(torch.equal(v, ends[1][1][i][k]) for k, v in state.items())


# Gradients that something changes after the backward pass has masked them


def run(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        assert_sparse(model)


def centralized(model: nn.Module) -> Callable[[], Tensor]:
    for parameter in model.parameters():
        parameter.register_hook(lambda g: g - g.mean())
    return lambda: F.cross_entropy(model(X), Y)


def penalized(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(model(X), Y) + 1e-2 * sum(p.sum() for p in model.parameters())


@pytest.mark.parametrize("disturb", [centralized, penalized])
@pytest.mark.parametrize("method", [RigL(3), Static(), SNFS(interval=3)], ids=lambda m: m.name)
def test_gradients_that_hooks_and_penalties_write(method: object, disturb: Callable) -> None:
    model, optimizer = attached(method)
    loss = disturb(model)
    run(model, optimizer, loss, 8)


LATER = [(RigL(3), 3), (GMP(3), 3), (RigL(1, end_fraction=0.005), 4), (Static(), 99)]


@pytest.mark.parametrize(("method", "steps"), LATER, ids=lambda x: getattr(x, "name", x))
def test_hooks_that_come_later_are_found(method: object, steps: int) -> None:
    """After an update, and every hundred steps."""
    model, optimizer = attached(method)
    train(model, [optimizer], steps)
    loss = centralized(model)
    run(model, optimizer, loss, 5)


def test_what_was_found_stays_found_when_a_group_is_added() -> None:
    model, optimizer = attached(Static())
    loss = penalized(model)
    run(model, optimizer, loss, 2)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    run(model, optimizer, loss, 3)


# Weights that others write


def reset(model: nn.Module) -> None:
    model.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)


def overwrite(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)


def point_elsewhere(model: nn.Module) -> None:
    nn.utils.vector_to_parameters(torch.randn(sum(p.numel() for p in model.parameters())) * 0.1, model.parameters())


@pytest.mark.parametrize("write", [reset, overwrite, point_elsewhere])
@pytest.mark.parametrize("steps", [0, 4])
def test_weights_that_others_write(write: Callable, steps: int) -> None:
    model, optimizer = attached(Static())
    train(model, [optimizer], steps)
    write(model)
    train(model, [optimizer], 3, lambda step: assert_sparse(model))


def test_weights_that_another_optimizer_moves() -> None:
    model, optimizer = attached(RigL(3))
    other = torch.optim.SGD(model.parameters(), 0.1)
    train(model, [other, optimizer], 7, lambda step: assert_sparse(model))


@pytest.mark.parametrize("when", [0, 2])
def test_weights_that_are_replaced_are_noticed_at_the_next_step(when: int) -> None:
    model, optimizer = attached(Static())
    train(model, [optimizer], when)
    model.load_state_dict(attached(Static())[0].state_dict(), assign=True)
    with pytest.raises(RuntimeError, match=r"weight was replaced .*fully_shard\(\).*make an optimizer"):
        train(model, [optimizer], 1)


# Steps that an update replaces


def test_gradients_are_there_after_an_update() -> None:
    """For loops that log them, and for graphs that replay into the same tensors."""
    model, optimizer = attached(RigL(2))
    for step in range(1, 5):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        before = {p: p.grad for p in model.parameters()}
        optimizer.step()
        assert all(p.grad is gradient for p, gradient in before.items()), step


def test_two_models_on_one_optimizer() -> None:
    alone, together = [attached(RigL(3), seed=seed) for seed in (0, 1)], []
    for model, optimizer in alone:
        train(model, [optimizer], 8)
    for seed in (0, 1):
        torch.manual_seed(0)
        together.append(sparsify(SmallNet(), 0.3, method=RigL(3), seed=seed))
    both = [p for model in together for p in model.parameters()]
    optimizer = torch.optim.SGD(both, 0.05, momentum=0.9, weight_decay=1e-3)
    for model in together:
        model.updater.attach(optimizer, total_steps=1000)
    for _ in range(8):
        optimizer.zero_grad()
        sum(F.cross_entropy(model(X), Y) for model in together).backward()
        optimizer.step()
    for (expected, _), model in zip(alone, together, strict=True):
        for key, value in expected.state_dict().items():
            assert torch.equal(value, model.state_dict()[key]), key


# Copies, which no optimizer drives


def test_statistics_of_an_average_are_those_of_the_sparse_network() -> None:
    model, optimizer = attached(RigL(2))
    average = AveragedModel(model)
    train(model, [optimizer], 8, lambda step: average.update_parameters(model))
    update_bn([X], average)
    plain = copy.deepcopy(average)
    with torch.no_grad():
        for name, mask in plain.module.updater.masks.items():
            plain.module.get_parameter(name).mul_(mask)
    update_bn([X], plain)
    assert not any(p.detach()[~m].any() for p, m in dropped(average.module))  # looked after when modes changed
    for key, value in plain.state_dict().items():
        if "running" in key:
            assert torch.equal(value, average.state_dict()[key]), key


def dropped(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return [(model.get_parameter(name), mask) for name, mask in model.updater.masks.items()]


def test_a_copy_trains_as_its_original() -> None:
    model, optimizer = attached(RigL(3))
    twin = copy.deepcopy(model)
    other = torch.optim.SGD(twin.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    F.cross_entropy(model(X), Y).backward()
    F.cross_entropy(twin(X), Y).backward()  # before it is attached
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    twin.updater.attach(other, total_steps=1000)
    train(model, [optimizer], 7)
    train(twin, [other], 7)
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in model.state_dict().items() if "running" not in k)


# Several ranks


def test_gradients_that_ranks_write_alike_are_no_drift() -> None:
    for counts in ranks.run(ranks.compressed, 2):
        assert counts == {"centralized": 0, "compressed": 0}


@pytest.mark.parametrize("how", ["edited", "uneven"])
def test_masks_that_drift_apart_end_training(how: str) -> None:
    with pytest.raises(ProcessRaisedException, match=r"masks of the ranks differ.*synchronize\(\)"):
        ranks.run(ranks.drift, 2, how)


def test_state_that_an_inner_optimizer_keeps() -> None:
    assert ranks.run(ranks.redundant, 2) == [[], []]


def test_flattened_shards_are_refused() -> None:
    for message in ranks.run(ranks.flat, 1)[0]:
        assert "fully_shard() instead" in message
