"""What real loops add: compiled steps, steps of two DDP processes, files."""

import functools
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet50
from workload import (
    DENSITY,
    FOREVER,
    Row,
    Trainer,
    interleave,
    ratio,
    sgd,
    small_batch,
    small_model,
    timed,
)

from sparsify import RigL, save_sparse, sparsify


def _trainer(sparse: bool) -> Trainer:
    """ResNet-18 at 32x32, dense or under RigL whose next update is far away."""
    model = sparsify(small_model(), DENSITY, method=RigL(interval=1000)) if sparse else small_model()
    optimizer = sgd(model)
    if sparse:
        model.updater.attach(optimizer, total_steps=FOREVER)
    return Trainer(model, optimizer, small_batch(), optimizer.step)


def _wrapped(trainer: Trainer, model: nn.Module) -> Trainer:
    return Trainer(model, trainer.optimizer, trainer.data, trainer.take_step)


def compiled_rows(repeats: int) -> list[Row]:
    """The ResNet-18 step, forward and backward compiled by Inductor."""
    trainers = {name: _trainer(name == "masked") for name in ("dense", "again", "masked")}
    cases = {n: timed(_wrapped(t, torch.compile(t.model, fullgraph=True)).step) for n, t in trainers.items()}
    seconds = interleave(cases, repeats)
    return [
        Row("ResNet-18 compiled step: masked / dense", "<= 1.10", ratio(seconds, "masked", "dense")),
        Row("ResNet-18 compiled step: dense / dense (noise)", "1", ratio(seconds, "again", "dense")),
    ]


def ddp_rows(repeats: int) -> list[Row]:
    """The ResNet-18 step on two DDP processes of one thread each (gloo)."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(functools.partial(_rank, folder=folder, repeats=repeats), nprocs=2)
        seconds = torch.load(Path(folder) / "seconds.pt")
    return [
        Row("ResNet-18 DDP step, 2 processes: masked / dense", "<= 1.05", ratio(seconds, "masked", "dense")),
        Row("ResNet-18 DDP step: dense / dense (noise)", "1", ratio(seconds, "again", "dense")),
    ]


def _rank(rank: int, folder: str, repeats: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    trainers = {name: _trainer(name == "masked") for name in ("dense", "again", "masked")}
    cases = {n: timed(_wrapped(t, DistributedDataParallel(t.model)).step) for n, t in trainers.items()}
    seconds = interleave(cases, repeats)
    if rank == 0:
        torch.save(seconds, Path(folder) / "seconds.pt")
    dist.destroy_process_group()


def file_row(repeats: int) -> Row:
    """The time of a file of a ResNet-50 of density 0.1, over `torch.save` of the dense one."""
    dense, sparse = resnet50(), sparsify(resnet50(), DENSITY)
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            "dense": timed(lambda: torch.save(dense.state_dict(), Path(folder) / "dense.pt")),
            "sparse": timed(lambda: save_sparse(sparse, Path(folder) / "sparse.safetensors")),
        }
        seconds = interleave(cases, repeats)
    return Row("ResNet-50: save_sparse / torch.save of the dense one", "<= 1", ratio(seconds, "sparse", "dense"))
