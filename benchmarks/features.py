"""What each library does, found out by running it: one check a row, whose answer or error is the cell."""

import contextlib
import copy
import io
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from libraries import LIBRARIES, Library, Training, UnsupportedError
from torch import Tensor, multiprocessing, nn
from torchvision.models import VisionTransformer, resnet18
from workload import mlp, sgd

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 10


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer with momentum and weight decay."""
    return torch.optim.AdamW(model.parameters(), 1e-3)


def small(library: Library, interval: int | None = 2, make: Callable = adamw) -> Training:
    """Train a multilayer perceptron, which all libraries take; with static masks where nothing ever grows."""
    torch.manual_seed(0)
    try:
        return library(mlp(256, 64), make, interval, VECTORS)
    except UnsupportedError:
        return library(mlp(256, 64), make, None, VECTORS)


def step(training: Training, model: nn.Module | None = None, x: Tensor = VECTORS) -> None:
    """Take one ordinary training step."""
    training.optimizer.zero_grad()
    F.cross_entropy((training.model if model is None else model)(x), LABELS[: len(x)]).backward()
    training.take_step()


def convolutions(library: Library) -> str:
    """How many weights of ResNet-18 have a mask."""
    return _masked(library, resnet18(num_classes=10))


def attention(library: Library) -> str:
    """How many weights of a vision transformer of two layers have one, and what else has."""
    return _masked(library, VisionTransformer(32, 8, 2, 2, 32, 64))


def _masked(library: Library, model: nn.Module) -> str:
    weights = {name for name, p in model.named_parameters() if p.dim() > 1} - {"class_token", "encoder.pos_embedding"}
    found = library(model, sgd, None, IMAGES).masks().keys()
    others = f", and {len(found - weights)} of norms" if found - weights else ""
    return f"{len(found & weights)} of {len(weights)}{others}"


def topology(library: Library) -> str:
    """Whether weights that were dropped can grow."""
    training = library(mlp(256, 64), adamw, 2, VECTORS)
    before = {name: mask.clone() for name, mask in training.masks().items()}
    for _ in range(5):
        step(training)
    grown = sum(int((mask & ~before[name].bool()).sum()) for name, mask in training.masks().items())
    return f"yes, {grown} in 2 updates" if grown else "no"


def scaler(library: Library) -> str:
    """Six steps under GradScaler, with updates among them."""
    training, scaling = small(library), torch.amp.GradScaler("cpu", init_scale=256.0)
    for _ in range(6):
        training.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(training.model(VECTORS), LABELS)
        scaling.scale(loss).backward()
        training.around_step(lambda: scaling.step(training.optimizer))
        scaling.update()
    return "yes"


def names(library: Library) -> str:
    """Whether the dense model reads the sparse one's state_dict."""
    state = small(library).model.state_dict()
    missing = mlp(256, 64).load_state_dict(state, strict=False).missing_keys
    return "kept" if not missing else f"{len(missing)} of 6 changed"


def resume(library: Library) -> str:
    """Stop after an update, go on from the state_dicts in a new model, and compare with training that went on."""
    first = small(library)
    for _ in range(3):
        step(first)
    saved = copy.deepcopy((first.model.state_dict(), first.optimizer.state_dict(), first.own_state()))
    second = small(library)
    with torch.no_grad():  # drawn elsewhere
        for parameter in second.model.parameters():
            parameter.mul_(0.5)
    second.model.load_state_dict(saved[0])
    second.optimizer.load_state_dict(saved[1])
    second.set_own_state(saved[2])
    for _ in range(4):
        step(first)
        step(second)
    pairs = zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    return "bit for bit" if all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor)) else "differs"


def deepcopy(library: Library) -> str:
    """Whether a copy of the model computes the same."""
    model = small(library).model
    return "yes" if torch.equal(copy.deepcopy(model)(VECTORS), model(VECTORS)) else "differs"


def average(library: Library) -> str:
    """Whether an average of five models can be made and evaluated."""
    training = small(library)
    ema = torch.optim.swa_utils.AveragedModel(training.model)
    for _ in range(5):
        step(training)
        ema.update_parameters(training.model)
    torch.manual_seed(0)
    return "yes" if ema.eval()(VECTORS).isfinite().all() else "not finite"


def compiled(library: Library) -> str:
    """One graph, without a break, and steps with updates."""
    training = small(library)
    forward = torch.compile(training.model, backend="aot_eager", fullgraph=True)
    for _ in range(4):
        step(training, forward)
    return "yes"


def ddp(library: Library) -> str:
    """Two processes, different data, seven steps with updates: whether masks are the same and weights as well."""
    name = next(key for key, value in LIBRARIES.items() if value is library)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_ddp_rank, (name, folder), nprocs=2)
        first, second = (torch.load(Path(folder) / f"{rank}.pt") for rank in range(2))
    same = [all(torch.equal(a, b) for a, b in zip(x, y, strict=True)) for x, y in zip(first, second, strict=True)]
    return {(True, True): "same", (False, True): "masks differ", (True, False): "weights differ"}.get(
        tuple(same), "masks and weights differ"
    )


def _ddp_rank(rank: int, name: str, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    training = small(LIBRARIES[name])
    model = nn.parallel.DistributedDataParallel(training.model)
    for i in range(7):
        step(training, model, VECTORS[4 * rank : 4 * rank + 4].roll(i, 0))
    parts = [mask for _, mask in sorted(training.masks().items())], [p.detach() for p in training.model.parameters()]
    torch.save(parts, Path(folder) / f"{rank}.pt")


def zeros(library: Library) -> str:
    """How many weights are kept before and after nine steps under momentum and weight decay."""
    training = small(library)
    before = sum(int(mask.sum()) for mask in training.masks().values())
    for _ in range(9):
        step(training)
    after = sum(int(mask.sum()) for mask in training.masks().values())
    return "stays" if before == after else f"{before} -> {after}"


def stored(library: Library) -> str:
    """Whether parameters are 0 where the mask drops them, or are masked whenever they are used."""
    training = small(library)
    for _ in range(9):
        step(training)
    parameters = dict(training.model.named_parameters())
    pairs = [(parameters.get(name), mask.bool()) for name, mask in training.masks().items()]
    if any(weight is None or weight.shape != mask.shape for weight, mask in pairs):
        return "kept ones only"
    return "no" if any(weight[~mask].any() for weight, mask in pairs) else "yes"


def file_size(library: Library) -> str:
    """A file of a ResNet-18 of density 0.1 over the dense one's, by the library's own function where it has one."""
    dense = _size(lambda path: torch.save(resnet18(num_classes=10).state_dict(), path))
    training = library(resnet18(num_classes=10), sgd, None, IMAGES)
    if not training.masks():
        raise UnsupportedError("no convolutions")
    if library is LIBRARIES["sparsify"]:
        from sparsify import save_sparse

        return f"{_size(lambda path: save_sparse(training.model, path)) / dense:.3f}"
    return f"{_size(lambda path: torch.save(training.model.state_dict(), path)) / dense:.3f}"


def _size(save: Callable[[Path], object]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "file")
        return os.path.getsize(Path(folder) / "file")


CHECKS: dict[str, Callable[[Library], str]] = {
    "weights of ResNet-18 masked": convolutions,
    "weights of a transformer masked": attention,
    "dropped weights grow back": topology,
    "number of kept weights": zeros,
    "dropped parameters are 0": stored,
    "trains under GradScaler": scaler,
    "parameter names": names,
    "training resumed": resume,
    "deepcopy": deepcopy,
    "averaged model": average,
    "torch.compile, one graph": compiled,
    "two DDP ranks": ddp,
    "file of ResNet-18 / dense": file_size,
}


def cells(library: Library) -> dict[str, str]:
    """Run every check and return its answer, or what went wrong."""
    found = {}
    for name, check in CHECKS.items():
        torch._dynamo.reset()
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[name] = check(library)
        except UnsupportedError as error:
            found[name] = str(error)
        except Exception as error:  # whatever a library raises is its answer
            lines = str(error).strip().splitlines() or [""]
            found[name] = f"no: {type(error).__name__}: {lines[-1][:60]}"
    return found
