"""Compressed parameters: the same training as with whole ones, in as much memory as is kept."""

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from passes.kernels import compiler
from passes.kernels.pending import pending
from passes.masking.mask import masks_of
from sparsify import (
    NM,
    SET,
    SNFS,
    RigL,
    SRigL,
    Static,
    compress,
    decompress,
    flop_report,
    fold,
    load_sparse,
    lower,
    save_sparse,
    sparsify,
    use_kernels,
)

pytestmark = pytest.mark.skipif(compiler.native() is None, reason="there is no C++ compiler here")


class Net(nn.Module):
    """Convolutions along one and two dimensions, with groups and strides, and linear layers; one layer runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 24, 3, stride=2, groups=2, bias=False)
        self.line = nn.Conv1d(24, 20, 3)
        self.twice = nn.Linear(20, 20)
        self.head = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu()
        x = self.line(x.flatten(2)).relu().mean(2)
        return self.head(self.twice(self.twice(x).relu()).relu())


class Called(Net):
    """The same layers, called by Python code that is no graph."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if bool(x.isfinite().all()) else x


def made(method: Any, density: float = 0.2, compressed: bool = True, net: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    model = sparsify(net(), None if method.layout.fixed else {"*.weight": density}, method=method, kernels="sparse")
    return compress(model) if compressed else model


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, 10, 9, generator=generator), torch.randint(0, 10, (6,), generator=generator)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    each: Callable[[nn.Module], Any] | None = None,
    call: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Train, calling something else than the model if it is given, and something after every backward pass."""
    for step in steps:
        optimizer.zero_grad()
        x, y = batch(step)
        F.cross_entropy((model if call is None else call)(x), y).backward()
        if each:
            each(model)
        optimizer.step()


def assert_same(compressed: nn.Module, whole: nn.Module) -> None:
    ours, theirs = compressed.state_dict(), whole.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            torch.testing.assert_close(tensor, theirs[name], rtol=2e-4, atol=2e-5, msg=name)
        else:
            assert torch.equal(tensor, theirs[name]), name


METHODS = {
    "static": Static(),
    "rigl": RigL(interval=4),
    "set": SET(interval=4),
    "srigl": SRigL(interval=4),
    "gradient": RigL(interval=4, growth_init="gradient"),
    "random": RigL(interval=4, growth_init="random"),
    "redistribution": RigL(interval=4, redistribution="gradient"),
    "nm": NM(1, 4, interval=4),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=2e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=2e-3, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02, initial_accumulator_value=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
}


@pytest.mark.parametrize(("method", "net"), [*((method, Net) for method in METHODS), ("rigl", Called)])
def test_methods_train_as_with_whole_parameters(method: str, net: type[nn.Module]) -> None:
    pair = [made(METHODS[method], compressed=c, net=net) for c in (True, False)]
    for model in pair:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        model.updater.attach(optimizer, total_steps=40)
        train(model, optimizer, range(24))
        assert model.updater.step == 24
    assert_same(*pair)
    assert pair[0].updater.history == pair[1].updater.history
    assert any(mask.compressed for mask in masks_of(pair[0]).values())
    state = pair[0].state_dict()
    assert pair[1].load_state_dict(state).missing_keys == pair[0].load_state_dict(pair[1].state_dict()).missing_keys == []
    torch.testing.assert_close(pair[0].eval()(batch(99)[0]), fold(pair[0]).eval()(batch(99)[0]))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers_hand_over_their_state(kind: str) -> None:
    pair, optimizers = [made(RigL(interval=3), compressed=c) for c in (True, False)], []
    for model in pair:
        optimizers.append(OPTIMIZERS[kind](model.parameters()))
        model.updater.attach(optimizers[-1], total_steps=30)
        train(model, optimizers[-1], range(13))
    assert_same(*pair)
    ours, theirs = (optimizer.state_dict()["state"] for optimizer in optimizers)
    for key, (parameter, _) in enumerate(pair[1].named_parameters()):
        mask = pair[1].updater.masks.get(parameter)
        for name, value in theirs[key].items():  # what begins at another number than 0 keeps it where nothing is kept
            both = [t if mask is None or t.dim() == 0 else t[mask] for t in (ours[key][name], value)]
            torch.testing.assert_close(*both, rtol=1e-3, atol=1e-4, msg=f"{parameter} {name}")


def test_memory_is_in_proportion_to_density() -> None:
    model = compress(sparsify(nn.Sequential(nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 100)), {"*.weight": 0.1}))
    optimizer = torch.optim.Adam(model.parameters())
    model.updater.attach(optimizer, total_steps=1000)
    model(torch.randn(4, 200)).square().sum().backward()
    optimizer.step()
    weights = [p for p in model.parameters() if p.dim() == 2]
    kept = [6000, 3000]
    assert [tuple(p.shape) for p in weights] == [(n, 1) for n in kept]
    for p, n in zip(weights, kept, strict=True):
        assert p.grad is not None
        held = [p, p.grad, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]]
        assert [t.untyped_storage().nbytes() for t in held] == [4 * n] * 4


def test_gradients_accumulate_over_backward_passes_of_a_step() -> None:
    def several(model: nn.Module) -> None:
        for seed in (100, 101):
            x, y = batch(seed)
            F.cross_entropy(model(x), y).backward()

    pair = [made(RigL(interval=2), compressed=c) for c in (True, False)]
    for model in pair:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        model.updater.attach(optimizer, total_steps=20)
        train(model, optimizer, range(9), several)
    assert_same(*pair)


def test_a_batch_that_is_given_up_leaves_nothing_behind() -> None:
    pair = [made(RigL(interval=2), compressed=c) for c in (True, False)]
    for model in pair:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        model.updater.attach(optimizer, total_steps=20)
        for step in range(8):
            for given_up in (True, False):
                x, y = batch(50 * given_up + step)
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert_same(*pair)


@pytest.mark.parametrize("how", ["norm", "backward twice", "checkpoint", "evaluation between"])
def test_gradients_are_clipped_and_activations_checkpointed(how: str) -> None:
    pair = [made(RigL(interval=2, growth_init="gradient"), compressed=c) for c in (True, False)]
    for model in pair:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        model.updater.attach(optimizer, total_steps=20)
        for step in range(8):
            optimizer.zero_grad()
            x, y = batch(step)
            out = checkpoint(model, x.requires_grad_(), use_reentrant=False) if how == "checkpoint" else model(x)
            F.cross_entropy(out, y).backward(retain_graph=how == "backward twice")
            if how == "backward twice":
                F.cross_entropy(out, y).backward()
            if how == "norm":  # of kept weights, so that both clip alike
                kept = [torch.where(m.mask, p.grad, 0) if p.grad.shape == m.mask.shape else p.grad for p, m in _pairs(model)]
                norm = torch.stack([g.norm() for g in kept]).norm()
                for p in model.parameters():
                    p.grad.mul_(0.1 / norm)
            if how == "evaluation between":
                with torch.no_grad():
                    model.eval()(x)
                model.train()
            optimizer.step()
    assert_same(*pair)


def _pairs(model: nn.Module) -> list[tuple[Any, Any]]:
    return [(model.get_parameter(name), mask) for name, mask in masks_of(model).items()]


def test_runs_go_on_with_and_without() -> None:
    """A run of four parts, each from the last one's files, compressed and whole in turn, is the run without a break."""
    straight = made(RigL(interval=3), compressed=False)
    optimizer = torch.optim.AdamW(straight.parameters(), lr=2e-3)
    straight.updater.attach(optimizer, total_steps=40)
    train(straight, optimizer, range(20))

    saved: Any = None
    model = straight
    for part in range(4):
        model = made(RigL(interval=3), compressed=part % 2 == 0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        model.updater.attach(optimizer, total_steps=40)
        if saved:
            first, second = torch.load(io.BytesIO(saved))
            for load, state in ((optimizer, second), (model, first)) if part == 1 else ((model, first), (optimizer, second)):
                load.load_state_dict(state)
        train(model, optimizer, range(5 * part, 5 * part + 5))
        file = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict()), file)
        saved = file.getvalue()
    assert_same(model, straight)


def test_what_is_made_of_a_compressed_model_is_as_of_a_whole_one(tmp_path: Any) -> None:
    model, x = made(Static()), batch(0)[0]
    whole = decompress(copy.deepcopy(model))
    assert [tuple(p.shape) for p in whole.parameters()] == [tuple(p.shape) for p in Net().parameters()]
    assert str(flop_report(model, x)) == str(flop_report(whole, x))
    for transform in (lambda m: m, lambda m: m.eval(), copy.deepcopy, fold, lambda m: lower(m.eval(), x)):
        torch.testing.assert_close(transform(copy.deepcopy(model))(x), whole.eval()(x), rtol=1e-4, atol=1e-5)
    save_sparse(model, tmp_path / "net.safetensors")
    plain = Net()
    load_sparse(plain, tmp_path / "net.safetensors")
    torch.testing.assert_close(plain(x), whole(x), rtol=1e-4, atol=1e-5)
    again = made(Static())
    load_sparse(again, tmp_path / "net.safetensors")
    assert_same(again, model)
    assert sparsify(Net(), masks=model, method="static").updater.nonzeros == model.updater.nonzeros


def _under_autocast(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x).float()


def test_whole_weights_of_functional_call_are_masked() -> None:
    model = made(Static())
    x = batch(0)[0]
    for mode in (True, False):
        torch.testing.assert_close(torch.func.functional_call(model.train(mode), dict(model.state_dict()), x), model(x))


def test_losses_that_are_kept_hinder_nothing() -> None:
    """A graph holds the node that takes a parameter's gradient, and that remembers a shape; counts vary here besides."""
    model = sparsify(Net(), {"*.weight": 0.2}, method=RigL(interval=2, redistribution="gradient"), kernels="sparse")
    losses = []
    for change in (lambda m: m, compress, decompress):
        optimizer = torch.optim.SGD(change(model).parameters(), lr=0.05)
        model.updater.attach(optimizer, total_steps=20)
        for step in range(5):
            optimizer.zero_grad()
            x, y = batch(step)
            losses.append(F.cross_entropy(model(x), y))
            losses[-1].backward()
            optimizer.step()
        model.updater.detach()


@pytest.mark.filterwarnings("ignore:kernels='sparse'")
def test_fallbacks_are_exact_too() -> None:
    """Under autocast and torch.func layers run the whole weight; growth sees its gradient there as well."""
    pair = [made(RigL(interval=2), compressed=c) for c in (True, False)]
    for model in pair:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        model.updater.attach(optimizer, total_steps=20)
        train(model, optimizer, range(5), call=functools.partial(_under_autocast, model))
    assert_same(*pair)
    model, x = made(Static()), batch(0)[0]
    found = torch.func.functional_call(model, dict(model.named_parameters()), (x,))
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


def test_compiled_steps() -> None:
    pair = [made(RigL(interval=2), compressed=c) for c in (True, False)]
    for number, model in enumerate(pair):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        model.updater.attach(optimizer, total_steps=20)
        call: Any = torch.compile(model, backend="aot_eager", fullgraph=True) if number == 0 else model
        train(model, optimizer, range(7), call=call)
    assert_same(*pair)


def test_large_factors_are_multiplied_at_once() -> None:
    model = compress(sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 64)), {"*": 0.2}, method=RigL(interval=1)))
    model.updater.attach(torch.optim.SGD(model.parameters(), lr=0.1), total_steps=10)
    for rows, products in ((2, 1), (200, 0)):
        for p in model.parameters():
            p.grad = None
        model(torch.randn(rows, 8)).square().sum().backward()
        found = pending(model[1].weight_mask.mask)
        assert found is not None
        assert len(found._products) == products


@pytest.mark.parametrize("growth_init", ["zeros", "gradient"])
def test_growth_keeps_the_largest_gradients_only(growth_init: str) -> None:
    """After a step of one backward pass; as in the same training of whole weights, also where most gradients are 0."""
    pair = [made(RigL(interval=2, growth_init=growth_init), compressed=c) for c in (True, False)]
    for model in pair:
        with torch.no_grad():
            model.head.bias[1:] = -50.0  # and so the gradients of their weights are 0
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        model.updater.attach(optimizer, total_steps=20)
        train(model, optimizer, range(1))
        train(model, optimizer, range(1, 2), each=_look if model is pair[0] else None)
        train(model, optimizer, range(2, 9))
    assert_same(*pair)


def _look(model: nn.Module) -> None:
    """Look at what is held before the step of the optimizer."""
    for name in ("second", "twice"):  # `twice` has two passes a step
        mask = model.get_submodule(name).weight_mask.mask
        found = pending(mask)
        assert found is not None
        held = sum(t.numel() for t in found.tensors())
        assert held == 4 * mask.sum() if name == "second" else held >= mask.numel()


@pytest.mark.filterwarnings("ignore:1 topology updates:UserWarning")
def test_an_update_after_unforeseen_passes_is_skipped() -> None:
    model = made(RigL(interval=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.updater.attach(optimizer, total_steps=20)
    train(model, optimizer, range(1))
    before = model.first.weight_mask.mask.clone()

    def twice(model: nn.Module) -> None:
        F.cross_entropy(model(batch(9)[0]), batch(9)[1]).backward()

    with pytest.warns(UserWarning, match="several backward passes"):
        train(model, optimizer, range(1, 2), each=twice)
    assert torch.equal(model.first.weight_mask.mask, before)
    assert int(model.updater.skipped) == 1
    whole = made(RigL(interval=2), compressed=False)
    other = torch.optim.SGD(whole.parameters(), lr=0.05)
    whole.load_state_dict(model.state_dict())
    whole.updater.attach(other, total_steps=20)
    train(model, optimizer, range(2, 8), each=twice)  # every step is known to have two now
    train(whole, other, range(2, 8), each=twice)
    assert not torch.equal(model.first.weight_mask.mask, before)
    assert_same(model, whole)


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no masks": (lambda: compress(Net()), ValueError, "no masks"),
    "dense": (lambda: compress(sparsify(Net(), 1.0)), ValueError, "density is 0.5 or more"),
    "double": (lambda: compress(sparsify(Net().double(), 0.1)), ValueError, "not float32"),
    "twice": (lambda: compress(made(Static())), ValueError, "compressed already"),
    "optimizer": (lambda: _attached(lambda p: torch.optim.LBFGS(p)), ValueError, "LBFGS is not known to treat"),
    "adafactor": (lambda: _attached(lambda p: torch.optim.Adafactor(p)), ValueError, "decompress"),
    "momentum": (lambda: _attached(method=SNFS()), ValueError, "needs all of a weight"),
    "attached": (lambda: compress(_attached(compressed=False)), RuntimeError, "before attach"),
    "attached compressed": (lambda: decompress(_attached()), RuntimeError, "detach"),
    "a mask by hand": (lambda: _written(made(Static())), RuntimeError, "was written to"),
    "a gradient by hand": (lambda: _by_hand(), RuntimeError, "no backward pass of this step"),
    "averages": (lambda: _averaged(), RuntimeError, "was written to"),
}


def _attached(make: Any = torch.optim.Adam, method: Any = None, compressed: bool = True) -> nn.Module:
    model = made(method or RigL(interval=1), compressed=compressed)
    model.updater.attach(make(model.parameters()), total_steps=1000)
    return model


def _written(model: nn.Module) -> None:
    mask = model.head.weight_mask.mask
    mask.copy_(mask.roll(1, 0))
    model(batch(0)[0])


def _by_hand() -> None:
    model = made(RigL(interval=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.updater.attach(optimizer, total_steps=10)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def _averaged() -> None:
    model = made(RigL(interval=1))
    average = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.updater.attach(optimizer, total_steps=10)
    train(model, optimizer, range(2))
    average.update_parameters(model)
    average.update_parameters(model)
    average(batch(0)[0])


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    run, error, text = BAD[case]
    with pytest.raises(error, match=text):
        run()


def test_an_activation_that_is_written_to_is_noticed() -> None:
    model = compress(sparsify(nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30)), {"*.weight": 0.1}, method=RigL(interval=1)))
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda module, given, result: seen.append(result))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.updater.attach(optimizer, total_steps=10)
    model(torch.randn(2, 30)).sum().backward()
    with torch.no_grad():
        seen[0].zero_()
    with pytest.raises(RuntimeError, match="activation was written to"):
        optimizer.step()


def test_moves_keep_values_and_other_kernels_stay_sparse() -> None:
    model = made(Static())
    x = batch(0)[0]
    before = model(x)
    assert torch.equal(model.to(memory_format=torch.channels_last)(x), before)
    use_kernels(model, "masked")
    assert all(mask.kernels == "sparse" for mask in masks_of(model).values() if mask.compressed)
    torch.testing.assert_close(model(x), before)
