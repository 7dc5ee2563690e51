"""Training: steps with kept weights only against dense ones, side by side.

A step is forward, backward and SGD with momentum, on as many threads as torch has. Dense is the fastest of eager and compiled,
contiguous and channels last, in the same round. Rounds take turns between all; a model takes as many as fit into its time,
three at least. Freed memory stays with the process, for all alike (docs/kernels.md says why). sparselab takes part where it is
installed (`pip install --no-deps sparselab==0.2.2`). A profile says where the time of a step at 90% goes.
"""

import argparse
import copy
import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import libraries
import torch
import torch.nn.functional as F
import torchvision
from environment import write_section
from tabulate import tabulate
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from workload import sgd

from passes.kernels.pending import pending
from sparsify import Method, RigL, Static, compress, sparsify
from sparsify.costs.speed import processor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))
from networks import WideResNet22  # noqa: E402

RESULTS = HERE / "RESULTS.md"
HEADING = "## Training: kept weights only against dense"  # a section for each kind of vectors
LEAST = 3  # rounds
KEEP_FREED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "68719476736"}  # glibc reads them when a process starts
Step = Callable[[], None]


def _perceptron() -> nn.Module:
    layers = [nn.Linear(4096, 4096) for _ in range(3)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def _blocks() -> nn.Module:
    """The MLPs of ViT-B/16, four of them."""
    return nn.Sequential(*(nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768)) for _ in range(4)))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "WRN-22-2, 128 x 32x32": (WideResNet22, (128, 3, 32, 32)),
    "ResNet-50, 16 x 128x128": (torchvision.models.resnet50, (16, 3, 128, 128)),
    "three layers of 4096, 128 rows": (_perceptron, (128, 4096)),
    "MLPs of ViT-B/16, 4 x 197 tokens": (_blocks, (4, 197, 768)),
}


def _step(model: nn.Module, call: nn.Module, x: Tensor) -> Step:
    """Return a step of a model, which `call` runs."""
    model.train()
    optimizer = sgd(model)
    updater = getattr(model, "updater", None)
    if updater:
        updater.attach(optimizer, total_steps=1_000_000)

    def step() -> None:
        optimizer.zero_grad()
        y = call(x)
        loss = F.cross_entropy(y, torch.zeros(len(y), dtype=torch.long)) if y.dim() == 2 else y.square().mean()
        loss.backward()
        optimizer.step()

    return step


def _dense(model: nn.Module, x: Tensor, compiled: bool) -> dict[str, Step]:
    """Return dense steps by name."""
    found = {}
    formats = (torch.contiguous_format, torch.channels_last) if x.dim() == 4 else (torch.contiguous_format,)
    for kind in (False, True) if compiled else (False,):
        for layout in formats:
            own = copy.deepcopy(model).to(memory_format=layout)
            given = x.contiguous(memory_format=layout)
            name = f"{'compiled' if kind else 'eager'}{', channels last' * (layout == torch.channels_last)}"
            found[name] = _step(own, torch.compile(own) if kind else own, given)
    return found


def sparse_step(model: nn.Module, x: Tensor, density: float, distribution: str, kernels: str) -> Step:
    """Return a step of a sparse copy, by one of the kinds of kernels, or with parameters compressed."""
    sparse = _sparse(model, density, distribution, Static(), "auto" if kernels == "compressed" else kernels)
    sparse = compress(sparse) if kernels == "compressed" else sparse
    return _step(sparse, sparse, x)


def _sparse(model: nn.Module, density: float, distribution: str, method: Method, kernels: str) -> nn.Module:
    budget = {"*": density} if isinstance(model, nn.Sequential) and distribution == "uniform" else density
    return sparsify(model, budget, distribution, method=method, kernels=kernels)


def _sparselab(model: nn.Module, x: Tensor, density: float) -> Step | None:
    """Return a step of sparselab's linear layers by its own recipe, where it is installed and there is nothing else."""
    if importlib.util.find_spec("sparselab") is None or any(isinstance(m, nn.Conv2d) for m in model.modules()):
        return None
    trained = libraries.sparselab(copy.deepcopy(model), sgd, None, x, density)
    return _step(trained.model, trained.model, x)


def _held(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Return bytes of weights, gradients and Adam's state: after a step, and at most in the step that decides growth."""
    optimizer = torch.optim.Adam(model.parameters())
    updater = getattr(model, "updater", None)
    if updater:
        updater.attach(optimizer, total_steps=100)

    def held() -> int:
        state = [v for own in optimizer.state.values() for v in own.values()]
        found = [*model.parameters(), *(p.grad for p in model.parameters()), *state]
        later = [t for mask in updater.masks.values() if (p := pending(mask)) for t in p.tensors()] if updater else []
        return sum(
            {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*found, *later) if t is not None}.values()
        )

    seen = []
    for _ in range(2):  # the second decides
        optimizer.zero_grad()
        model(x).square().mean().backward()
        seen.append(held())
        optimizer.step()
        seen.append(held())
    return seen[1], max(seen)


def memory(name: str, density: float) -> list[str]:
    """Return a row: what compressed parameters take in memory, relative to dense training."""
    make, shape = MODELS[name]
    model, x = make(), torch.randn(shape)
    sparse = compress(_sparse(model, density, "uniform", RigL(interval=2), "sparse"))
    masks = sum(mask.numel() for mask in sparse.updater.masks.values())  # bytes
    (dense, _), (usual, most) = _held(model, x), _held(sparse, x)
    return [f"{name}, uniform {density:g}", *(f"{n / dense:.2f}" for n in (usual, most, usual + masks))]


def updates(name: str, density: float) -> list[str]:
    """Return a row: what an update costs beside ordinary steps, with the dense gradient before it and new tables after it."""
    make, shape = MODELS[name]
    model, x = make(), torch.randn(shape)
    static, updating = (
        _step(sparse, sparse, x)
        for sparse in (_sparse(model, density, "uniform", method, "auto") for method in (Static(), RigL(interval=2)))
    )
    more, usual = [], []
    for _ in range(1 + LEAST):  # the first warms up; of two steps the second is the update
        times = []
        for step in (static, updating):
            begin = time.perf_counter()
            step()
            step()
            times.append(time.perf_counter() - begin)
        usual.append(times[0] / 2)
        more.append(times[1] - times[0])
    step, update = median(usual[1:]), median(more[1:])
    return [f"{name}, uniform {density:g}", f"{1e3 * step:.0f}", f"{1e3 * update:.0f}", f"{update / step / 100:.1%}"]


def measure(name: str, cases: list[tuple[str, float]], budget: float, compiled: bool) -> list[list[str]]:
    """Return a row for every distribution and density: how many times as long the fastest dense step takes."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, x = make(), torch.randn(shape)
    dense = _dense(model, x, compiled)
    kinds = ("auto", "sparse", "compressed")
    sparse = {(*case, k): sparse_step(model, x, case[1], case[0], k) for case in cases for k in kinds}
    peers = {(*case, "sparselab"): _sparselab(model, x, case[1]) for case in cases if case[0] == "uniform"}
    sparse |= {case: step for case, step in peers.items() if step}
    masked = (*cases[0], "masked")
    steps: dict[Any, Step] = {**dense, **sparse, masked: sparse_step(model, x, cases[0][1], cases[0][0], "masked")}
    seconds: dict[Any, list[float]] = {step: [] for step in steps}
    for step in steps.values():
        step()
        step()
    started = time.perf_counter()
    while len(seconds[masked]) < LEAST or time.perf_counter() - started < budget:
        for step, run in steps.items():
            begin = time.perf_counter()
            run()
            seconds[step].append(time.perf_counter() - begin)
    fastest = [min(times) for times in zip(*(seconds[step] for step in dense), strict=True)]
    best = min(dense, key=lambda step: median(seconds[step]))

    def ratio(case: Any) -> str:
        return f"{median(f / t for f, t in zip(fastest, seconds[case], strict=True)):.2f}" if case in seconds else ""

    return [
        [
            f"{name}, {case[0]} {case[1]:g}",
            f"{1e3 * median(seconds[(*case, 'auto')]):.0f}",
            *(ratio((*case, kernels)) for kernels in (*kinds, "masked", "sparselab")),
            best,
            str(len(fastest)),
        ]
        for case in cases
    ]


def profiled(name: str) -> str:
    """Return where the time of a step at 90% goes, by operator."""
    make, shape = MODELS[name]
    step = sparse_step(make(), torch.randn(shape), 0.1, "uniform", "auto")
    step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    events = sorted(found.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    rows = [(e.key.removeprefix("GeneratedBackwardFor_"), f"{e.self_cpu_time_total / total:.0%}", e.count) for e in events[:8]]
    return f"One step of {name}, uniform 0.1, by operator:\n\n{tabulate(rows, ['operator', 'share', 'calls'], 'github')}"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--densities", nargs="+", type=float, default=[0.1, 0.05, 0.02])
    parser.add_argument("--distributions", nargs="+", default=["uniform", "erk"])
    parser.add_argument("--seconds", type=float, default=60.0, help="for the rounds of a model")
    parser.add_argument("--eager", action="store_true", help="leave compiled steps out, which take minutes to compile")
    parser.add_argument("--write", action="store_true", help="replace the section in RESULTS.md")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    cases = [(distribution, density) for distribution in args.distributions for density in args.densities]
    rows, profiles, bytes_held, changes = [], [], [], []
    os.environ |= KEEP_FREED
    # A process for each model: compiled steps and their memory stay as long as it does.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for name in args.models:
            rows += pool.submit(measure, name, cases, args.seconds, not args.eager).result()
            print(*rows[-len(cases) :], file=sys.stderr, sep="\n", flush=True)
        for name in args.models[:2]:
            profiles.append(pool.submit(profiled, name).result())
        for name in args.models:
            bytes_held.append(pool.submit(memory, name, 0.1).result())
            changes.append(pool.submit(updates, name, 0.1).result())
    heads = [
        "step",
        "auto, ms",
        "dense / auto",
        "dense / sparse",
        "dense / compressed",
        "dense / masked",
        "dense / sparselab",
        "fastest dense",
        "rounds",
    ]
    facts = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    heading = f"{HEADING}, {torch.backends.cpu.get_cpu_capability()}"
    text = f"{heading}\n\nHow many times as long dense steps take; {facts}.\n\n"
    text += f"{tabulate(rows, heads, 'github', disable_numparse=True)}\n\n"
    text += (
        "Bytes of weights, gradients and Adam's state with `compress`, relative to dense: after a step, at most in the step "
    )
    text += "whose dense gradient decides growth, and after a step with the masks, a byte per weight:\n\n"
    text += tabulate(bytes_held, ["model", "after a step", "at most", "with masks"], "github", disable_numparse=True)
    text += (
        "\n\nAn update beside ordinary steps: its dense gradient, the choice of weights, and the tables of new patterns:\n\n"
    )
    costs = ["model", "step, ms", "update, ms more", "of all steps' time, every 100"]
    text += tabulate(changes, costs, "github", disable_numparse=True)
    text += "\n\n" + "\n\n".join(profiles) + "\n"
    print(text)
    if args.write:
        write_section(RESULTS, heading, text)


if __name__ == "__main__":
    main()
