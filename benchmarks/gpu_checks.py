"""What has to hold on a GPU. Each check runs on any device, and returns what it saw or raises AssertionError."""

import contextlib
import copy
import io
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparsify import GMP, NM, SET, SNFS, SNIP, Method, RigL, SRigL, Static, sparsify

UPDATES = 50
STEPS = 2 * UPDATES + 4
_ALL = 0.999  # of a run: until when updates go on
METHODS: dict[str, Callable[[], Method]] = {
    "static": Static,
    "rigl": lambda: RigL(interval=2, end_fraction=_ALL),
    "rigl, redistributed": lambda: RigL(interval=2, end_fraction=_ALL, redistribution="gradient"),
    "set": lambda: SET(interval=2, end_fraction=_ALL),
    "snfs": lambda: _with_exact_average(SNFS(interval=2, end_fraction=_ALL)),
    "gmp": lambda: GMP(interval=2, end_fraction=_ALL),
    "gmp, global": lambda: GMP(interval=2, end_fraction=_ALL, scope="global"),
    "snip": SNIP,
    "srigl": lambda: SRigL(interval=2, end_fraction=_ALL),
    "2:4": lambda: NM(2, 4, interval=2, end_fraction=_ALL),
}


def _with_exact_average(method: Method) -> Method:
    """Halve instead of taking tenths, so that a moving average of numbers of few bits is not rounded for long."""
    assert method.updates
    return replace(method, updates=replace(method.updates, momentum=0.5))


def network() -> nn.Module:
    """Return a small network with convolutions and linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 16)
    )


def batch(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return images and labels for it."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, 8, 8, 8, generator=generator).to(device), (torch.arange(16) % 16).to(device)


def sparse(method: Method, device: torch.device, steps: int = STEPS, **options: Any) -> tuple[nn.Module, Any]:
    """Return a sparse network on a device, and SGD that is attached to it."""
    model = sparsify(network(), None if method.layout.fixed else 0.3, method=method).to(device)
    optimizer = torch.optim.SGD(model.parameters(), **({"lr": 0.01, "momentum": 0.9} | options))
    model.updater.attach(optimizer, total_steps=steps)
    return model, optimizer


def step(model: nn.Module, optimizer: Any, data: tuple[Tensor, Tensor]) -> None:
    """Take one step of training."""
    optimizer.zero_grad()
    F.cross_entropy(model(data[0]), data[1]).backward()
    optimizer.step()


def assert_same(one: nn.Module, two: nn.Module) -> None:
    """Raise unless parameters and masks are equal bit for bit."""
    for name, mask in one.updater.masks.items():
        assert torch.equal(mask.cpu(), two.updater.masks[name].cpu()), f"the mask of {name} differs"
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a.cpu(), b.cpu()), f"{name} differs"


def masks_equal_those_of_the_cpu(device: torch.device) -> str:
    """After 50 updates of every method, with the same gradients: numbers of few bits, of which no sum is rounded."""
    for name, method in METHODS.items():
        pair = [sparse(method(), where, lr=0.125, momentum=0.0) for where in (torch.device("cpu"), device)]
        with torch.no_grad():
            for parameter in (p for model, _ in pair for p in model.parameters()):
                parameter.copy_((parameter * 256).round() / 256)
        generator = torch.Generator().manual_seed(0)
        for _ in range(STEPS - 1):
            gradients = [torch.randint(-8, 9, p.shape, generator=generator) / 64.0 for p in pair[0][0].parameters()]
            for model, optimizer in pair:
                masks = {model.get_parameter(n): mask for n, mask in model.updater.masks.items()}
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    sparse_part = parameter in masks and not model.updater.gradients_are_dense
                    gradient = gradient.to(parameter.device, copy=True)  # which methods write to
                    parameter.grad = gradient * masks[parameter] if sparse_part else gradient
                optimizer.step()
        assert_same(pair[0][0], pair[1][0])
        updates = len(pair[1][0].updater.history) - 1
        assert updates >= UPDATES or name in ("static", "snip"), f"{name}: {updates} updates"
    return f"{len(METHODS)} methods"


@contextlib.contextmanager
def not_waiting(device: torch.device) -> Iterator[None]:
    """Raise at whatever waits for the device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def steps_and_updates_do_not_wait(device: torch.device) -> str:
    """Neither ordinary steps nor updates that keep the counts ask the device for a number, after the first two."""
    data, names = batch(device), ("static", "rigl", "set", "snfs", "srigl", "2:4")
    for name in names:
        model, optimizer = sparse(METHODS[name](), device)
        for _ in range(4):
            step(model, optimizer, data)
        with not_waiting(device):
            for _ in range(6):
                step(model, optimizer, data)
    return ", ".join(names)


def graphs_replay(device: torch.device) -> str:
    """Two captured graphs, of ordinary steps and of those before an update, train as calls do."""
    data, runs = batch(device), []
    for captured in (False, True):
        model, optimizer = sparse(RigL(interval=4), device, steps=80)
        passes: dict[bool, Callable[[], None]] = {}
        for _ in range(24):
            dense = model.updater.gradients_are_dense
            if not captured or dense not in passes:
                optimizer.zero_grad(set_to_none=not passes)
                run = passes.setdefault(dense, _captured(model, data, device) if captured else _passes(model, data))
            else:
                run = passes[dense]
                optimizer.zero_grad(set_to_none=False)
            run()
            optimizer.step()
        runs.append(model)
    for one, two in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
    return "2 graphs, 24 steps"


def _passes(model: nn.Module, data: tuple[Tensor, Tensor]) -> Callable[[], None]:
    return lambda: F.cross_entropy(model(data[0]), data[1]).backward()


def _captured(model: nn.Module, data: tuple[Tensor, Tensor], device: torch.device) -> Callable[[], None]:
    run = _passes(model, data)
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def scaled_fused_optimizers_train(device: torch.device) -> str:
    """Under GradScaler and autocast, fused optimizers keep dropped weights 0, and masks change."""
    data, half = batch(device), torch.float16 if device.type == "cuda" else torch.bfloat16
    for make in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        model = sparsify(network(), 0.3, method=RigL(interval=3)).to(device)
        optimizer, scaler = make(model.parameters(), lr=1e-3, fused=True), torch.amp.GradScaler(device.type)
        model.updater.attach(optimizer, total_steps=100)
        before = copy.deepcopy(model.updater.masks)
        for _ in range(12):
            optimizer.zero_grad()
            with torch.autocast(device.type, half):
                loss = F.cross_entropy(model(data[0]), data[1])
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        masks = model.updater.masks
        assert not any(model.get_parameter(name)[~mask].any() for name, mask in masks.items()), "a dropped weight moved"
        assert not all(torch.equal(mask, before[name]) for name, mask in masks.items()), "no mask has changed"
        assert all(p.isfinite().all() for p in model.parameters())
    return "SGD, Adam, AdamW"


def runs_resume(device: torch.device) -> str:
    """A run that is saved and loaded goes on bit for bit."""
    data = batch(device)
    whole, optimizer = sparse(RigL(interval=3), device)
    for _ in range(10):
        step(whole, optimizer, data)
    file = io.BytesIO()
    torch.save((whole.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, later = sparse(RigL(interval=3), device)
    other.load_state_dict(saved[0])
    later.load_state_dict(saved[1])
    for _ in range(10):
        step(whole, optimizer, data)
        step(other, later, data)
    assert_same(whole, other)
    return "20 steps"


def data_parallel_trains(device: torch.device) -> str:
    """One process under DistributedDataParallel trains as it does alone."""
    data, backend = batch(device), "nccl" if device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{Path(folder) / 'store'}", rank=0, world_size=1)
        try:
            model, optimizer = sparse(RigL(interval=3), device)
            wrapped = DistributedDataParallel(model, device_ids=[device.index or 0] if device.type == "cuda" else None)
            for _ in range(8):
                step(wrapped, optimizer, data)
        finally:
            dist.destroy_process_group()
    alone, optimizer = sparse(RigL(interval=3), device)
    for _ in range(8):
        step(alone, optimizer, data)
    assert_same(alone, model)
    return backend


CHECKS: tuple[Callable[[torch.device], str], ...] = (
    masks_equal_those_of_the_cpu,
    steps_and_updates_do_not_wait,
    graphs_replay,
    scaled_fused_optimizers_train,
    runs_resume,
    data_parallel_trains,
)
