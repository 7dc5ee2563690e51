"""One run: train a task with a method, resume where it was interrupted, and write what came of it as JSON."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tasks import TASKS, Task
from torch import nn
from tqdm import tqdm

from sparsify import (
    GMP,
    NM,
    SET,
    SNFS,
    SNIP,
    Method,
    RigL,
    SRigL,
    Static,
    cost_ledger,
    flop_report,
    load_checkpoint,
    save_checkpoint,
    small_dense,
    sparsify,
)
from sparsify.saving.files import replacing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHECKPOINT_SECONDS = 30


@dataclass(frozen=True)
class Run:
    """One training run; everything that its result depends on."""

    task: str
    method: str = "rigl"  # a key of METHODS, "dense", "small-dense", "lottery" or "re-init"
    density: float = 0.1
    distribution: str = "erk"  # or "constant": the same density in every layer, the first included
    seed: int = 0
    longer: float = 1.0  # training length: "RigL 2x" is 2
    interval: int | None = None  # None: the task's
    drop_fraction: float = 0.3
    validation: bool = False  # whether the score is that of held-out training data, for choosing hyper-parameters
    kernels: str = "masked"  # what masked layers run on a CPU: `sparsify` says
    flops: bool = False  # density stands for the uniform distribution's, and this one's is set to the same FLOPs

    @property
    def name(self) -> str:
        """A name for files, short and without two runs sharing it."""
        default = Run(self.task)
        shown = {k: v for k, v in asdict(self).items() if k != "task" and v != getattr(default, k)}
        return "-".join([self.task, *(f"{k}={v}" for k, v in shown.items())]).replace("/", "_")


Maker = Callable[[int, float, Task], Method]  # (interval, drop_fraction, task)
METHODS: dict[str, Maker] = {
    "static": lambda t, a, task: Static(),
    "set": lambda t, a, task: SET(t, a),
    "snfs": lambda t, a, task: SNFS(t, a),
    "rigl": lambda t, a, task: RigL(t, a),
    "rigl-sg": lambda t, a, task: RigL(t, a, redistribution="gradient"),
    "rigl-sm": lambda t, a, task: RigL(t, a, redistribution="momentum"),
    "rigl-struct": lambda t, a, task: RigL(t, a, layout="kernels"),
    "rigl-2x1": lambda t, a, task: RigL(t, a, layout="2x1"),
    "rigl-4x1": lambda t, a, task: RigL(t, a, layout="4x1"),
    "srigl": lambda t, a, task: SRigL(t, a),
    "gmp": lambda t, a, task: GMP(t, **task.gmp),
    "gmp-global": lambda t, a, task: GMP(t, **task.gmp, scope="global"),
    "snip": lambda t, a, task: SNIP(),
    "snip-layer": lambda t, a, task: SNIP(scope="layer"),
    "nm": lambda t, a, task: NM(2, 4, t, a),
}
_TAKEN_FROM = {"lottery": "gmp-global", "re-init": "rigl"}  # whose masks they take


def train(run: Run, folder: Path, root: Path | None = None, quick: bool = False, show: bool = True) -> dict[str, Any]:
    """Train one run, or read its result if it is there already.

    Args:
        run: what to train.
        folder: of results; a run that was interrupted goes on from its checkpoint there.
        root: of the data, for tasks that need one.
        quick: one epoch on little data.
        show: whether to show a progress bar.

    Returns:
        The result, as written to `<folder>/<run.name>.json`.
    """
    path, task = folder / f"{run.name}.json", TASKS[run.task]
    epochs = 1 if quick else max(1, round(task.epochs * run.longer))
    made_from = {"data": str(root or "built in"), "quick": quick, "epochs": epochs}
    if path.exists():
        return _read(path, made_from)
    folder.mkdir(parents=True, exist_ok=True)
    content = task.data(root, quick, run.validation)
    total = epochs * content.steps
    torch.manual_seed(run.seed)
    dense = task.model()
    model = _build(run, task, dense, folder, root, quick, total).to(DEVICE)
    optimizer = task.optimizer(model.parameters())
    scheduler = task.scheduler(optimizer, total)
    checkpoint = folder / f"{run.name}.pt"
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    updater = model._modules.get("updater")
    saved = load_checkpoint(checkpoint, **parts) or {"epoch": 0, "seconds": 0.0}
    first, seconds = saved["epoch"], saved["seconds"]
    if updater is not None:
        updater.attach(optimizer, total_steps=total)
    bar = tqdm(total=total, initial=first * content.steps, desc=run.name, disable=not show)
    started, saved_at = time.process_time(), time.monotonic()  # CPU time: runs beside each other do not lengthen it
    model.train()
    for epoch in range(first, epochs):
        for x, y in content.train(run.seed, epoch):
            _step(task, model, optimizer, x.to(DEVICE), y.to(DEVICE))
            scheduler.step()
            bar.update()
        if time.monotonic() - saved_at > CHECKPOINT_SECONDS and epoch + 1 < epochs:
            spent = seconds + time.process_time() - started
            save_checkpoint(checkpoint, **parts, epoch=epoch + 1, seconds=spent)
            saved_at = time.monotonic()
    bar.close()
    result = {
        "run": asdict(run),
        **made_from,
        "cpu_seconds": round(seconds + time.process_time() - started, 3),
        "steps": total,
    }
    result |= {task.metric: evaluate(task, model, content)} | _costs(run, task, model, dense)
    if updater is not None:
        torch.save({name: mask.cpu() for name, mask in updater.masks.items()}, folder / f"{run.name}.masks.pt")
    with replacing(path) as partial:
        partial.write_text(json.dumps(result, indent=1))
    checkpoint.unlink(missing_ok=True)
    return result


def _read(path: Path, made_from: dict[str, Any]) -> dict[str, Any]:
    """Read a result, unless it is of other data or of another length."""
    result = json.loads(path.read_text())
    for key, value in made_from.items():
        if result.get(key) != value:
            raise SystemExit(
                f"{path} was made with {key}={result.get(key)!r}, asked for is {value!r}. Name another folder with --results, "
                f"or delete the file."
            )
    return result


def _build(run: Run, task: Task, dense: nn.Module, folder: Path, root: Path | None, quick: bool, total: int) -> nn.Module:
    """Make the model that a run trains."""
    if run.method == "dense":
        return dense
    if run.method == "small-dense":
        return small_dense(dense, _share_of_parameters(dense, run.density), task.inputs)
    if run.method in _TAKEN_FROM:
        parent = replace(run, method=_TAKEN_FROM[run.method])
        train(parent, folder, root, quick, show=False)
        masks = torch.load(folder / f"{parent.name}.masks.pt")
        if run.method == "lottery":  # the weights that its parent started from
            return sparsify(dense, masks=masks, method="static", kernels=run.kernels)
        torch.manual_seed(run.seed + 1000)
        return sparsify(task.model(), masks=masks, method="static", init="fan_in", kernels=run.kernels)
    interval = run.interval or task.interval
    interval = min(interval, max(1, total // 10)) if quick else interval
    method = METHODS[run.method](interval, run.drop_fraction, task)
    budget: dict[str, Any] = {} if method.layout.fixed else {"density": run.density}
    if run.distribution == "constant":
        budget = {"density": {"*": run.density}}
    if run.flops:
        uniform = flop_report(sparsify(dense, run.density, "uniform"), task.inputs)
        budget = {"flops": uniform.inference_ratio, "inputs": task.inputs}
    init = "keep" if method.prunes else "fan_in"
    distribution = "erk" if run.distribution == "constant" else run.distribution
    return sparsify(dense, distribution=distribution, method=method, seed=run.seed, init=init, kernels=run.kernels, **budget)


def _share_of_parameters(dense: nn.Module, density: float) -> float:
    """Return the share of all parameters, embeddings and biases included, that a sparse network of a density keeps."""
    sparse, total = sparsify(dense, density), sum(p.numel() for p in dense.parameters())
    sizes = {name: mask.numel() for name, mask in sparse.updater.masks.items()}
    return 1 - (sum(sizes.values()) - sum(sparse.updater.nonzeros.values())) / total


def _step(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y, label_smoothing=task.smoothing).backward()
    if task.clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), task.clip)
    optimizer.step()


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, content: Any) -> float:
    """Return the test accuracy in percent, or the bits per character."""
    model.eval()
    total = count = 0.0
    for x, y in content.test():
        out, y = model(x.to(DEVICE)), y.to(DEVICE)
        accuracy = task.metric == "accuracy"
        total += (out.argmax(1) == y).sum().item() if accuracy else F.cross_entropy(out, y, reduction="sum").item()
        count += y.numel()
    return 100 * total / count if task.metric == "accuracy" else total / count / math.log(2)


def _costs(run: Run, task: Task, model: nn.Module, dense: nn.Module) -> dict[str, Any]:
    """Return what the run cost relative to dense training of ordinary length, and the densities over time."""
    report, full = flop_report(model, task.inputs), flop_report(dense, task.inputs)
    inference, training, history = report.sparse_macs / full.dense_macs, report.sparse_macs / full.dense_macs, []
    weights = [[layer for layer in r.layers if layer.weight_shape] for r in (report, full)]
    kept = sum(layer.nonzeros for layer in weights[0]) / sum(layer.params for layer in weights[1])
    if (updater := model._modules.get("updater")) is not None:
        training = cost_ledger(model, task.inputs).training_ratio
        sizes = {name: mask.numel() for name, mask in updater.masks.items()}
        history = [[h.step, {n: round(c / sizes[n], 5) for n, c in h.nonzeros.items()}] for h in updater.history]
        history = [entry for i, entry in enumerate(history) if not i or entry[1] != history[i - 1][1]]
    return {
        "kept": kept,  # of all weights that multiply, those of dense layers included
        "inference_ratio": inference,
        "training_ratio": training * run.longer,
        "densities": history,
    }
