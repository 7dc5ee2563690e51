"""Real training loops: scaling, accumulation, clipping, checkpointing of activations, schedulers, averages, resuming."""

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from models import SmallNet
from test_methods import TABLE
from test_updates import X, Y, assert_sparse, attached, train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.optim.swa_utils import AveragedModel
from torch.utils import checkpoint

from sparsify import GMP, SNFS, Method, RigL, flop_report, fold, graphs, sparsify


def backward(model: nn.Module, scale: float = 1.0) -> None:
    (F.cross_entropy(model(X), Y) * scale).backward()


def dropped_gradient(model: nn.Module) -> bool:
    return any(model.get_parameter(n).grad[~mask].any().item() for n, mask in model.updater.masks.items())


# Scaled gradients


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True])  # which skips in its own kernel
@pytest.mark.parametrize("at", [2, 3])  # an ordinary step, and one that updates
def test_an_overflow_updates_nothing_and_loses_nothing(dtype: torch.dtype, unscale: bool, fused: bool, at: int) -> None:
    """Training with an overflow is training without that batch: the update comes one batch later."""
    runs = []
    for overflow in (False, True):
        model, optimizer = attached(make=lambda p: torch.optim.AdamW(p, 1e-2, fused=fused))
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=1000)
        for batch in range(1, 8 + overflow):
            bad = overflow and batch == at
            before = copy.deepcopy(model.state_dict())
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = F.cross_entropy(model(X), Y)
            scaler.scale(loss * (torch.inf if bad else 1.0)).backward()
            if unscale:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update(128.0)
            if bad:
                moved = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
                assert all("running" in k or "num_batches" in k for k in moved)
                for key in moved:  # the forward pass of the lost batch, which every network keeps
                    model.state_dict()[key].copy_(before[key])
        assert model.updater.skipped_updates == 0
        runs.append(model.state_dict())
    for key, value in runs[0].items():
        assert torch.equal(value, runs[1][key]), key


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_fused_optimizers_under_a_scaler_see_the_unscaled_gradient(name: str) -> None:
    """A fused optimizer unscales in its own kernel: growth by momentum must not depend on the scale."""
    masks = []
    for scale in (1.0, 1024.0):
        model, optimizer = attached(
            RigL(3, redistribution="momentum"), make=lambda p: getattr(torch.optim, name)(p, lr=1e-3, fused=True)
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for _ in range(7):
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(X), Y)).backward()
            scaler.step(optimizer)
            scaler.update(scale)
            assert_sparse(model)
        masks.append(copy.deepcopy(model.updater.masks))
        masks.append({k: v.clone() for k, v in model.updater.named_buffers() if k.startswith("momentum")})
    for k, v in masks[0].items():
        assert torch.equal(v, masks[2][k])
    for k, v in masks[1].items():
        torch.testing.assert_close(v, masks[3][k])


# Accumulation, clipping, zeroing


@pytest.mark.parametrize("to_none", [False, True])
def test_the_dense_window_covers_every_micro_batch_of_an_update_and_no_other(to_none: bool) -> None:
    model, optimizer = attached(RigL(interval=3))
    dense = []
    for step in range(1, 8):
        optimizer.zero_grad(set_to_none=to_none)
        for micro in range(4):
            before = {n: 0 if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
            F.cross_entropy(model(X[2 * micro : 2 * micro + 2]), Y[2 * micro : 2 * micro + 2]).backward()
            added = {n: model.get_parameter(n).grad - before[n] for n in model.updater.masks}
            dense.append((step, any(a[~model.updater.masks[n]].any().item() for n, a in added.items())))
        optimizer.step()
        assert_sparse(model)
    assert [flag for _, flag in dense] == [step % 3 == 0 for step, _ in dense]


def test_accumulated_micro_batches_grow_what_the_whole_batch_grows() -> None:
    masks = []
    for parts in (1, 4):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10)).double()
        model = sparsify(net, 0.3, method=RigL(interval=2))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model.updater.attach(optimizer, total_steps=100)
        for _ in range(6):
            optimizer.zero_grad()
            for x, y in zip(X.double().chunk(parts), Y.chunk(parts), strict=True):
                (F.cross_entropy(model(x), y) / parts).backward()
            optimizer.step()
        masks.append(model.updater.masks)
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


def test_norms_see_the_sparse_gradient() -> None:
    model, optimizer = attached(RigL(interval=100))
    optimizer.zero_grad()
    backward(model)
    total = sum((p.grad * model.updater.masks.get(n, torch.tensor(True))).square().sum() for n, p in model.named_parameters())
    torch.testing.assert_close(nn.utils.clip_grad_norm_(model.parameters(), 1e9), total.sqrt())


# Schedulers


@pytest.mark.parametrize("first", [False, True])
def test_schedulers_before_or_after(first: bool) -> None:
    model = sparsify(SmallNet(), 0.3, method=RigL(interval=3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    make = [
        lambda: model.updater.attach(optimizer, total_steps=100),
        lambda: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
    ]
    made = [f() for f in (reversed(make) if first else make)]
    scheduler = next(m for m in made if m is not None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(7):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)
    assert model.updater.step == 7


# Activation checkpointing


class Recomputing(nn.Module):
    """Recomputes one block, by one of the ways to say so."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(192, 32)
        self.block = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
        self.head = nn.Linear(32, 10)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.block, self.first(x.flatten(1)).relu()))


def run_plain(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


def run_checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint.checkpoint(block, x, use_reentrant=False)


def run_reentrant(block: nn.Module, x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(lambda value: block(value), x, use_reentrant=True)


def run_sequential(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint.checkpoint_sequential(list(block), 3, x, use_reentrant=False)


def run_renamed(block: nn.Module, x: Tensor) -> Tensor:
    return partial(checkpoint.checkpoint, use_reentrant=False)(block, x)


def calls_in_a_step(model: nn.Module) -> int:
    """How often a block's first layer runs in a step of the dense model; 2 unless recomputing stops early."""
    calls = []
    model.block[0].register_forward_hook(lambda *_: calls.append(1))
    backward(model)
    return len(calls)


def test_recomputed_activations_are_recomputed_and_change_nothing() -> None:
    results = {}
    for run in (run_plain, run_checkpointed, run_reentrant, run_sequential, run_renamed):
        torch.manual_seed(0)
        model = sparsify(Recomputing(run), 0.3, method=RigL(interval=2))
        assert len(model.updater.masks) == 4
        calls = []
        model.block[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model.updater.attach(optimizer, total_steps=100)
        train(model, [optimizer], 5, lambda step, model=model: assert_sparse(model))
        assert len(calls) == 5 * calls_in_a_step(Recomputing(run))
        results[run] = model.state_dict()
    for state in results.values():
        for key, value in results[run_plain].items():
            assert torch.equal(value, state[key]), key
    assert set(graphs(model)) == {"first", "block", "head"}


# Averages


def test_averages_stay_sparse_follow_masks_and_fold() -> None:
    model, optimizer = attached(GMP(interval=2), total=16)
    average = AveragedModel(model, avg_fn=lambda a, b, n: 0.5 * a + 0.5 * b)
    train(model, [optimizer], 16, lambda step: average.update_parameters(model))
    assert average.module.updater.nonzeros == model.updater.nonzeros
    assert flop_report(average.module, (1, 3, 8, 8)).sparse_macs == flop_report(model, (1, 3, 8, 8)).sparse_macs
    plain = fold(average.module).eval()
    assert torch.equal(plain(X), average.eval()(X))
    for name, mask in model.updater.masks.items():
        assert not plain.get_parameter(name)[~mask].any()


# Schedules


def test_a_longer_schedule_says_what_happens() -> None:
    model, optimizer = attached(RigL(interval=10), total=100)
    train(model, [optimizer], 12)
    model.updater.detach(keep_step=True)
    with pytest.warns(UserWarning, match=r"was 100 up to step 12 and is 200.*from step 70 to 140.*step 20, from 0.25 to 0.287"):
        model.updater.attach(optimizer, total_steps=200)
    assert model.updater.step == 12
    model.updater.detach(keep_step=True)
    with pytest.warns(UserWarning, match=r"from step 140 to 10: none is left"):
        model.updater.attach(optimizer, total_steps=15)
    model.updater.detach()
    assert model.updater.step == 0


def test_scalars() -> None:
    model, optimizer = attached(RigL(interval=2))
    train(model, [optimizer], 5)
    scalars = model.updater.scalars()
    assert scalars["sparsity/updates"] == 2
    assert scalars["sparsity/density"] == pytest.approx(0.3, abs=1e-3)
    assert scalars["sparsity/density/fc.weight"] == model.updater.densities["fc.weight"]
    assert all(isinstance(value, float) for value in scalars.values())


# Compiled, and free of waits


def one_step(forward: Callable, optimizer: torch.optim.Optimizer, take_step: Callable) -> None:
    optimizer.zero_grad()
    F.cross_entropy(forward(X), Y).backward()
    take_step()


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_training_steps(whole: bool) -> None:
    """Forward and optimizer step compiled, apart or with all between; hooks go on running."""
    states = []
    for compiled in (False, True):
        torch._dynamo.reset()
        compile_ = partial(torch.compile, backend="aot_eager", disable=not compiled)
        model, optimizer = attached(RigL(3))
        forward, take_step = (model, optimizer.step) if whole else (compile_(model), compile_(optimizer.step))
        run = compile_(one_step) if whole else one_step
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dynamo's own, about what it leaves out
            for _ in range(8):
                run(forward, optimizer, take_step)
                assert_sparse(model)
        assert (model.updater.step, len(model.updater.history)) == (8, 3)
        states.append(model.state_dict())
    for key, value in states[0].items():
        if value.is_floating_point():
            torch.testing.assert_close(value, states[1][key], rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(value, states[1][key]), key


class Broken(nn.Module):
    """A recurrent layer and a branch on data: dynamo compiles what lies between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.recurrent, self.last = nn.Linear(24, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.recurrent(self.first(x.flatten(2)))[0].mean(1))


def test_compiled_models_with_graph_breaks() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = sparsify(Broken(), 0.3, method=RigL(2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.updater.attach(optimizer, total_steps=40)
    forward = torch.compile(model, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo looks at .grad of what a graph break hands on
        for _ in range(5):
            one_step(lambda x: forward(x.transpose(1, 2)), optimizer, optimizer.step)
            assert_sparse(model)


@pytest.mark.parametrize("method", [m for m in TABLE.values() if not m.counts_vary()], ids=lambda m: m.name)
def test_no_step_and_no_update_waits_for_the_device(method: Method) -> None:
    """On meta tensors whoever asks for a value gets an error: only what can be queued without waiting runs there."""
    with torch.device("meta"):
        net, x, y = SmallNet(), torch.empty(8, 3, 8, 8), torch.empty(8, dtype=torch.long)
    model = sparsify(net, None if method.layout.fixed else 0.3, method=method)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, foreach=False)
    model.updater.attach(optimizer, total_steps=40)
    for _ in range(14):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert len(model.updater.history) == (5 if method.updates else 1)


def test_updates_leave_tensors_where_they_are() -> None:
    """CUDA graphs replay on addresses: masks, weights and optimizer state must be written in place."""
    model, optimizer = attached(RigL(2), make=torch.optim.AdamW)
    train(model, [optimizer], 1)

    def addresses() -> list[int]:
        state = [t for s in optimizer.state.values() for t in s.values()]
        return [t.data_ptr() for t in (*model.parameters(), *model.buffers(), *state)]

    before, masks = addresses(), copy.deepcopy(model.updater.masks)
    train(model, [optimizer], 6)
    assert addresses() == before
    assert any(not torch.equal(m, masks[n]) for n, m in model.updater.masks.items())


# torch.distributed.checkpoint


def test_a_rehearsal_is_no_step() -> None:
    """To learn what an optimizer keeps, torch.distributed.checkpoint takes a step at rate 0 with gradients of 0."""
    model, optimizer = attached(RigL(2), make=lambda p: torch.optim.SGD(p, 0.1))
    train(model, [optimizer], 3)
    optimizer.zero_grad()
    before = copy.deepcopy(model.state_dict())
    get_state_dict(model, optimizer)
    assert model.updater.step == 3
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # as at the start of a warm-up
    train(model, [optimizer], 1)
    assert model.updater.step == 4
    assert len(model.updater.history) == 3


@pytest.mark.parametrize("sparse_gradient", [False, True])
def test_steps_at_a_rate_of_zero_count(sparse_gradient: bool) -> None:
    """A warm-up from 0 is training, whether gradients come before the step or with its closure."""
    model, optimizer = attached(RigL(2))
    for group in optimizer.param_groups:
        group["lr"] = 0.0

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    for _ in range(3):
        if sparse_gradient:
            optimizer.zero_grad(set_to_none=False)
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    assert model.updater.step == 3


# Copies, groups, other ways to fill a model


def test_copies_of_a_compiled_model_are_models_of_their_own() -> None:
    model = sparsify(SmallNet(), 0.3).eval()
    model.compile(backend="eager")
    model(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), AveragedModel(model).module, fold(model)):
        assert torch.equal(twin(X), model(X))
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert not twin(X).any()


def test_weights_that_join_the_optimizer_later_are_updated() -> None:
    model = sparsify(SmallNet(), 0.3, method=RigL(3))
    model.conv1.weight.requires_grad_(False)
    rest = [p for p in model.parameters() if p is not model.conv1.weight]
    optimizer = torch.optim.SGD(rest, 0.05, momentum=0.9)
    model.updater.attach(optimizer, total_steps=100)
    train(model, [optimizer], 4)
    before = model.updater.masks["conv1.weight"].clone()
    model.conv1.weight.requires_grad_(True)
    optimizer.add_param_group({"params": [model.conv1.weight]})
    train(model, [optimizer], 6, lambda step: assert_sparse(model))
    assert not torch.equal(before, model.updater.masks["conv1.weight"])


def test_masks_that_nobody_filled() -> None:
    with torch.device("meta"):
        net = SmallNet()
    saved = sparsify(SmallNet(), 0.3, method=RigL(3)).state_dict()
    model = sparsify(net, 0.3, method=RigL(3)).to_empty(device="cpu")
    for mask in model.updater.masks.values():
        mask.fill_(True)  # what memory happened to hold
    with pytest.raises(ValueError, match=r"mask of conv1.weight keeps 432 weights and should keep"):
        model.updater.attach(torch.optim.SGD(model.parameters(), 0.1), total_steps=100)
    model.load_state_dict(saved)
    assigned = sparsify(net, 0.3, method=RigL(3))
    assigned.load_state_dict(saved, assign=True)
    for twin in (model, assigned):
        optimizer = torch.optim.SGD(twin.parameters(), 0.1)
        twin.updater.attach(optimizer, total_steps=100)
        train(twin, [optimizer], 4, lambda step, twin=twin: assert_sparse(twin))


def test_inference_mode() -> None:
    with torch.inference_mode():
        model = sparsify(SmallNet(), 0.3)
        assert flop_report(copy.deepcopy(model), (1, 3, 8, 8)).density == pytest.approx(0.3, abs=1e-3)


def test_weights_loaded_without_masks_leave_the_goals() -> None:
    model, optimizer = attached(SNFS(3), total=40)
    train(model, [optimizer], 20)
    goals = dict(model.updater.goals)
    model.load_state_dict(SmallNet().state_dict(), strict=False)
    assert model.updater.goals == goals
    model.load_state_dict({k: v for k, v in model.state_dict().items() if "updater" not in k}, strict=False)
    assert {n: goal.target for n, goal in model.updater.goals.items()} == model.updater.nonzeros


def test_what_attach_was_told_stays_when_a_state_is_loaded_after_it() -> None:
    model, optimizer = attached(RigL(10), total=100)
    train(model, [optimizer], 12)
    saved = model.state_dict()
    twin, _ = attached(RigL(10), total=200)
    with pytest.warns(UserWarning, match="was 100 up to step 12 and is 200"):
        twin.load_state_dict(saved)
    assert (twin.updater.step, twin.updater.total_steps) == (12, 200)


def test_another_interval_is_said() -> None:
    model, optimizer = attached(RigL(10), total=100)
    train(model, [optimizer], 3)
    twin = sparsify(SmallNet(), 0.3, method=RigL(5))
    with pytest.warns(UserWarning, match="another interval, drop fraction or end"):
        twin.load_state_dict(model.state_dict())


def test_the_history_of_several_clocks_is_in_order() -> None:
    model = sparsify(SmallNet(), 0.3, method=RigL(2, redistribution="gradient"))
    optimizers = [
        torch.optim.SGD(model.conv2.parameters(), 0.1),
        torch.optim.SGD([*model.conv1.parameters(), *model.fc.parameters()], 0.1),
    ]
    model.updater.attach(*optimizers, total_steps=40)
    size = model.updater.get_extra_state().numel()
    for step in range(12):
        backward(model)
        for optimizer in optimizers[: 1 + step % 2]:
            optimizer.step()
        model.zero_grad()
    steps = [entry.step for entry in model.updater.history]
    assert steps == sorted(set(steps))
    assert model.updater.get_extra_state().numel() <= size
