"""Real processes for tests: what each rank does. Results come back through files."""

import functools
import os
import signal
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from forks import SERVER
from torch import Tensor, multiprocessing, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from passes.shards import whole
from sparsify import (
    GMP,
    RigL,
    compress,
    flop_report,
    fold,
    ignore_in_ddp,
    load_checkpoint,
    save_checkpoint,
    save_sparse,
    sparsify,
)
from sparsify.methods.method import Method

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(12, 3, 8, 8, generator=GENERATOR)
Y = torch.arange(12) % 10


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.out = nn.Conv2d(outputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(x).relu()).relu()


class Net(nn.Module):
    """Blocks and a head; no norm, whose statistics would depend on how a batch is divided."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(3, 8), Block(8, 15))  # 15 does not divide by the number of ranks
        self.head = nn.Linear(15, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


def run(function: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """Run `function(rank, *args)` on several processes and return what each of them does."""
    with tempfile.TemporaryDirectory() as folder:
        work = functools.partial(_rank, function=function, ranks=ranks, folder=folder, args=args)
        multiprocessing.start_processes(work, nprocs=ranks, start_method=SERVER.get_start_method())  # raises what a rank raises
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _rank(rank: int, function: Callable[..., Any], ranks: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    result = function(rank, *args)
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def make(method: Method, seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return sparsify(Net(), None if method.layout.fixed else 0.4, method=method, seed=0, **options)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, share: slice = slice(None)) -> None:
    """Train on a share of the batch, which moves so that no two steps are alike."""
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X[share].roll(step, -1)), Y[share]).backward()
        optimizer.step()


def state(model: nn.Module) -> dict[str, Tensor]:
    """Return weights, masks and the updater's state, whole."""
    return {name: whole(value).clone() for name, value in model.state_dict().items()}


# What ranks do


def ddp_methods(rank: int, methods: list[Method], steps: int, kernels: str = "masked") -> dict[str, dict[str, Tensor]]:
    """Train every method under DDP on different data, with accumulation under no_sync."""
    results = {}
    for method in methods:
        model = make(method, kernels=kernels.removeprefix("compressed "))
        model = compress(model) if kernels.startswith("compressed") else model
        optimizer = sgd(model)
        model.updater.attach(optimizer, total_steps=steps)
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        for step in range(steps):
            optimizer.zero_grad()
            own, labels = X[rank::2].roll(step, -1), Y[rank::2]
            with ddp.no_sync():
                F.cross_entropy(ddp(own[:3]), labels[:3]).backward()
            F.cross_entropy(ddp(own[3:]), labels[3:]).backward()
            optimizer.step()
        results[method.name] = state(model)
    return results


def ddp_buffers(rank: int, nested: bool) -> tuple[list[str], list[str]]:
    """List the buffers that DDP broadcasts before a forward pass, and those that it ignores."""
    model = make(RigL(3, redistribution="momentum"))
    model.register_buffer("statistics", torch.zeros(3))
    if nested:
        model = nn.Sequential(nn.Identity(), model)
        ignore_in_ddp(model)
    ddp = DistributedDataParallel(model)
    return list(ddp.named_module_buffers), sorted(ddp.parameters_to_ignore)


def ddp_resume(rank: int, methods: list[Method], folder: str) -> list[str]:
    """Stop and go on with every method; list those that end otherwise than without the stop."""
    different = []
    for method in methods:
        ends = []
        for stop in (False, True):
            model, path = make(method), Path(folder) / f"{method.name}.pt"
            optimizer = sgd(model)
            model.updater.attach(optimizer, total_steps=24)
            train(DistributedDataParallel(model), optimizer, 7, slice(rank, None, 2))
            if stop:
                if rank == 0:
                    save_checkpoint(path, model=model, optimizer=optimizer)
                dist.barrier()
                model = make(method, seed=1)
                optimizer = sgd(model)
                load_checkpoint(path, model=model, optimizer=optimizer)
                model.updater.attach(optimizer, total_steps=24)
            train(DistributedDataParallel(model), optimizer, 9, slice(rank, None, 2))
            ends.append(state(model))
        different += [f"{method.name}: {k}" for k, v in ends[0].items() if not torch.equal(v, ends[1][k])]
    return different


def sharded(method: Method, seed: int = 0) -> nn.Module:
    """Make a model whose blocks are sharded one by one, as large ones are."""
    model = make(method, seed, blocks=["blocks.*"])
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp_methods(rank: int, methods: list[Method], folder: str) -> dict[str, Any]:
    """Train every method under FSDP2 on equal data; stop and go on through torch.distributed.checkpoint."""
    results: dict[str, Any] = {}
    for method in methods:
        model, path = sharded(method), f"{folder}/{method.name}"
        optimizer = sgd(model)
        model.updater.attach(optimizer, total_steps=24)
        train(model, optimizer, 7)
        dcp.save(_states(model, optimizer), checkpoint_id=path)
        train(model, optimizer, 9)
        results[method.name] = state(model)
        twin = sharded(method, seed=1)
        other = sgd(twin)
        twin.updater.attach(other, total_steps=24)
        resume(twin, other, path)
        train(twin, other, 9)
        end = state(twin)
        results[f"{method.name} resumed otherwise"] = [k for k, v in results[method.name].items() if not torch.equal(v, end[k])]
    return results


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    parts = get_state_dict(model, optimizer)
    return dict(zip(("model", "optimizer"), parts, strict=True))


def resume(model: nn.Module, optimizer: torch.optim.Optimizer, path: str) -> None:
    """Load what torch.distributed.checkpoint wrote, on any number of ranks."""
    parts = _states(model, optimizer)
    dcp.load(parts, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])


def fsdp_resume(rank: int, method: Method, path: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Go on from a file of another number of ranks; return the state at the start and at the end."""
    model = sharded(method, seed=2)
    optimizer = sgd(model)
    model.updater.attach(optimizer, total_steps=24)
    resume(model, optimizer, path)
    before = state(model)
    train(model, optimizer, 9)
    return before, state(model)


def export(rank: int, path: str) -> dict[str, Tensor]:
    """Train shards, and write them as one sparse file, as README says."""
    model = sharded(RigL(2))
    optimizer = sgd(model)
    model.updater.attach(optimizer, total_steps=24)
    train(model, optimizer, 7)
    for use in (lambda: save_sparse(model, path), lambda: fold(model), lambda: flop_report(model, (1, *X.shape[1:]))):
        with pytest.raises(ValueError, match=r"is sharded over ranks. Load the whole state_dict"):
            use()
    whole_state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        copy = make(RigL(2), seed=1)
        copy.load_state_dict(whole_state)
        save_sparse(copy, path)
    return state(model)


def disagree(rank: int, hows: list[str]) -> dict[str, str]:
    """Give the ranks different masks in every way there is, and return what happens."""
    return {how: _disagree(rank, how) for how in hows}


def _disagree(rank: int, how: str) -> str:
    model = make(RigL(3 + rank if how == "interval" else 3))
    if how == "seed":
        model = sparsify(Net(), 0.4, method=RigL(3), seed=rank)
    optimizer = sgd(model)
    model.updater.attach(optimizer, total_steps=20 + 10 * (how == "schedule") * rank)
    ddp = DistributedDataParallel(model)
    if how == "later" and rank:
        model.updater.masks["head.weight"].logical_not_()
    if how == "load":
        train(ddp, optimizer, 4)
        saved = model.state_dict()
        saved["blocks.0.conv.weight_mask.mask"] = saved["blocks.0.conv.weight_mask.mask"].roll(rank)
        model.load_state_dict(saved)
    if how == "past ddp":
        train(model, optimizer, 4, slice(rank, None, 2))  # whose gradients nobody reduces
        try:
            model.updater.compare_ranks()
        except RuntimeError as error:
            return str(error)
    weights = state(model)
    try:
        train(ddp, optimizer, 1)
    except RuntimeError as error:
        assert all(torch.equal(v, weights[k]) for k, v in state(model).items())
        return str(error)
    return "trained"


def drift(rank: int, how: str) -> None:
    """Let masks drift apart long after the first step, and go on."""
    model = make(RigL(3))
    optimizer = sgd(model)
    model.updater.attach(optimizer, total_steps=60)
    ddp = DistributedDataParallel(model)
    if how == "uneven":
        with ddp.join():
            train(ddp, optimizer, 6 + 5 * rank, slice(rank, None, 2))  # and nobody calls synchronize()
    else:
        train(ddp, optimizer, 6, slice(rank, None, 2))
        mask = model.updater.masks["blocks.0.conv.weight"]
        mask.copy_(mask.clone().roll(rank))
    train(ddp, optimizer, 12, slice(rank, None, 2))


def compressed(rank: int) -> dict[str, int]:
    """Train with gradients that are not 0 where weights are dropped, on all ranks alike; count weights that moved off 0."""
    return {how: _compressed(rank, how) for how in ("centralized", "compressed")}


def _compressed(rank: int, how: str) -> int:
    model = make(GMP(3, end_fraction=0.8) if how == "centralized" else RigL(3))
    optimizer = sgd(model)
    model.updater.attach(optimizer, total_steps=40)
    ddp = DistributedDataParallel(model)
    if how == "compressed":
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=5)
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    else:
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: gradient - gradient.mean())
    train(ddp, optimizer, 14, slice(rank, None, 2))
    weights = model.updater.masks.items()
    return sum(int(model.get_parameter(name).detach()[~mask].count_nonzero()) for name, mask in weights)


def redundant(rank: int) -> list[str]:
    """List the weights whose state at dropped positions is not 0 under an optimizer that holds another."""
    model = make(RigL(2))
    ddp = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)
    model.updater.attach(optimizer, total_steps=40)
    train(ddp, optimizer, 9, slice(rank, None, 2))
    kept = {n: optimizer.optim.state.get(model.get_parameter(n), {}) for n in model.updater.masks}
    assert any(kept.values())
    masks = model.updater.masks
    return [n for n, s in kept.items() if s and s["momentum_buffer"][~masks[n]].any()]


def flat(rank: int) -> list[str]:
    """Shard a sparsified model by flattening, both ways, and return what attaching says."""
    messages = []
    for original in (False, True):
        model = make(RigL(2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own end
            sharded = FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))
        try:
            model.updater.attach(sgd(sharded), total_steps=40)
        except ValueError as error:
            messages.append(str(error))
    return messages


def mend(rank: int) -> dict[str, Tensor]:
    """Start from different masks, take over those of one rank, and train."""
    model = sparsify(Net(), 0.4, method=RigL(3), seed=rank)
    optimizer = sgd(model)
    model.updater.attach(optimizer, total_steps=40)
    model.updater.synchronize()
    train(DistributedDataParallel(model), optimizer, 10, slice(rank, None, 2))
    return state(model)


def warm_up(rank: int) -> tuple[int, dict[str, Tensor]]:
    """Shard a model of which one rank's gradients are all 0 at first, and start at a rate of 0."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 1))
    nn.init.zeros_(net[3].weight)
    model = sparsify(net, 0.5, method=RigL(2))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = sgd(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 3))
    model.updater.attach(optimizer, total_steps=40)
    for _ in range(7):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
        schedule.step()
    return model.updater.step, state(model)


def alone(rank: int) -> str:
    """Train an own model on every rank, as a search over seeds does."""
    model = sparsify(Net(), 0.4, method=RigL(3), seed=rank)
    optimizer = sgd(model)
    groups = [dist.new_group([r]) for r in range(dist.get_world_size())]
    model.updater.attach(optimizer, total_steps=20, process_group=groups[rank])
    train(model, optimizer, 7 + rank)
    return f"trained {model.updater.step}"


def uneven(rank: int) -> dict[str, Tensor]:
    """Have one rank run out of data, then go on together."""
    model = make(RigL(3))
    optimizer = sgd(model)
    model.updater.attach(optimizer, total_steps=40)
    ddp = DistributedDataParallel(model)
    with ddp.join():
        train(ddp, optimizer, 5 + 4 * rank, slice(rank, None, 2))
    model.updater.synchronize()
    for name, mask in model.updater.masks.items():
        weight = model.get_parameter(name)
        assert not weight.detach()[~mask].any()
        assert not optimizer.state[weight]["momentum_buffer"][~mask].any()
    train(ddp, optimizer, 7, slice(rank, None, 2))
    return state(model)


def train_saving(method: Method, path: Path, end: Path | None) -> tuple[dict[str, Tensor], int]:
    """Train to the end, saving after every step and going on from what is saved."""
    torch.set_num_threads(1)
    model = make(method)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    parts = {"model": model, "optimizer": optimizer}
    saved = load_checkpoint(path, **parts)
    first = saved["step"] if saved else 0
    model.updater.attach(optimizer, total_steps=160)
    for step in range(first, 160):
        optimizer.zero_grad()
        index = torch.randint(12, (6,))  # of the global generator, which a checkpoint holds
        F.cross_entropy(model(X[index]), Y[index]).backward()
        optimizer.step()
        save_checkpoint(path, **parts, step=step + 1)
    if end is not None:
        torch.save(state(model), end)
    return state(model), first


def save_forever(path: Path) -> None:
    """Write the file of a model that changes, again and again."""
    torch.set_num_threads(1)
    model = make(RigL())
    while True:
        with torch.no_grad():
            model.blocks[0].conv.bias.fill_(torch.rand(()).item())
            weight = model.blocks[1].conv.weight
            weight.copy_(torch.where(model.updater.masks["blocks.1.conv.weight"], torch.rand(()) + 0.1, 0))
        save_sparse(model, path)


def train_or_die(rank: int, method: Method, path: Path, die_at: int | None) -> dict[str, Tensor]:
    """Train under DDP with a checkpoint every five steps; rank 1 may kill itself on the way."""
    model = make(method)
    optimizer = sgd(model)
    parts = {"model": model, "optimizer": optimizer}
    saved = load_checkpoint(path, **parts)
    model.updater.attach(optimizer, total_steps=24)
    ddp = DistributedDataParallel(model)
    for step in range(saved["step"] if saved else 0, 24):
        if rank == 1 and step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        own = torch.arange(12)[rank :: dist.get_world_size()]
        optimizer.zero_grad()
        F.cross_entropy(ddp(X[own].roll(step, -1)), Y[own]).backward()
        optimizer.step()
        if rank == 0 and step % 5 == 4:
            save_checkpoint(path, **parts, step=step + 1)
    return state(model)
