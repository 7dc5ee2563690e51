"""What sparse training costs, as ratios to dense training and to other tools.

Every ratio comes from one run of this script that takes turns between both sides, so that a slow moment of the machine
hits both; figures of different runs or machines do not compare.
"""

import argparse
import copy
import logging
import warnings

import torch
from loops import compiled_rows, ddp_rows, file_row
from peers import feature_table, measure, ratio_table
from tabulate import tabulate
from torch import fx, nn
from torch.profiler import ProfilerActivity, profile
from torchvision import models
from torchvision.models import resnet50
from workload import (
    DENSITY,
    FOREVER,
    WARMUP,
    Row,
    Trainer,
    batch,
    dense_trainer,
    interleave,
    ratio,
    sgd,
    shown,
    small_batch,
    small_model,
    timed,
    timed_update,
)

from sparsify import GMP, NM, Method, RigL, SRigL, Static, flop_report, sparsify


def sparse_trainer(
    model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], method: Method, steps: int = FOREVER, kernels: str = "masked"
) -> Trainer:
    """The sparse side of a ratio, with the updater attached."""
    model = sparsify(model, None if method.layout.fixed else DENSITY, method=method, kernels=kernels)
    optimizer = sgd(model)
    model.updater.attach(optimizer, total_steps=steps)
    return Trainer(model, optimizer, data, optimizer.step)


def small_rows(repeats: int) -> list[Row]:
    """The ResNet-18 training step and topology update."""
    data = small_batch()
    updating = sparse_trainer(small_model(), data, RigL(interval=2))
    before = {name: mask.clone() for name, mask in updating.model.updater.masks.items()}
    cases = {
        "dense": timed(dense_trainer(small_model(), data).step),
        "again": timed(dense_trainer(small_model(), data).step),
        "masked": timed(sparse_trainer(small_model(), data, Static()).step),
        "auto": timed(sparse_trainer(small_model(), data, Static(), kernels="auto").step),
        "update": timed_update(updating),
    }
    seconds = interleave(cases, repeats)
    if all(torch.equal(before[name], mask) for name, mask in updating.model.updater.masks.items()):
        raise RuntimeError("No update changed a mask, so what was timed is not an update.")
    return [
        Row("ResNet-18 step: masked / dense", "<= 1.06", ratio(seconds, "masked", "dense")),
        Row("ResNet-18 step: kernels='auto' / dense", "< 1", ratio(seconds, "auto", "dense")),
        Row("ResNet-18 step: dense / dense (noise)", "1", ratio(seconds, "again", "dense")),
        Row("ResNet-18: update / dense step", "<= 0.4", ratio(seconds, "update", "dense")),
    ]


LARGE = {  # torchvision model: (batch, image size, goal)
    "resnet50": (8, 128, "<= 1.05"),
    "vit_b_16": (2, 224, "<= 1.10"),
    "swin_t": (4, 224, "<= 1.10"),
}


def large_rows(name: str, repeats: int) -> list[Row]:
    """The training step of a model of usual size."""
    count, size, goal = LARGE[name]
    data, build = batch(count, size), models.get_model_builder(name)
    cases = {
        "dense": timed(dense_trainer(build(num_classes=10), data).step),
        "again": timed(dense_trainer(build(num_classes=10), data).step),
        "masked": timed(sparse_trainer(build(num_classes=10), data, Static()).step),
    }
    seconds = interleave(cases, repeats)
    return [
        Row(f"{name} step: masked / dense", goal, ratio(seconds, "masked", "dense")),
        Row(f"{name} step: dense / dense (noise)", "1", ratio(seconds, "again", "dense")),
    ]


def update_rows(repeats: int) -> list[Row]:
    """The updates of ResNet-50 that compare layers, over RigL's, which does not.

    Pruning follows an optimizer step, whose time is in its row.
    """
    methods = {
        "RigL": RigL(interval=2),
        "RigL redistributed by gradient": RigL(interval=2, redistribution="gradient"),
        "GMP global": GMP(interval=2, end_fraction=1.0, scope="global"),
        "SRigL": SRigL(interval=2),
        "2:4": NM(2, 4, interval=2),
    }
    data, steps = batch(2, 64), 6 * (repeats + WARMUP)
    cases = {name: timed_update(sparse_trainer(resnet50(), data, method, steps)) for name, method in methods.items()}
    seconds = interleave(cases, repeats)
    goals = {"RigL redistributed by gradient": "<= 3", "GMP global": "<= 3"}
    return [Row(f"ResNet-50 update: {n} / RigL", goals.get(n, ""), ratio(seconds, n, "RigL")) for n in list(methods)[1:]]


def sparsify_row(repeats: int) -> Row:
    """The time of `sparsify` itself."""
    model = resnet50()

    def copy_and_trace() -> None:
        copy.deepcopy(model)
        fx.Tracer().trace(model)

    cases = {"sparsify": timed(lambda: sparsify(model, density=DENSITY)), "base": timed(copy_and_trace)}
    seconds = interleave(cases, repeats)
    return Row("ResNet-50: sparsify / (deepcopy + fx trace)", "<= 2.5", ratio(seconds, "sparsify", "base"))


def report_rows(repeats: int) -> list[Row]:
    """The time of fvcore's count of a dense model over that of `flop_report`, of this model and of its sparse copy.

    fvcore counts the dense model in both rows: it knows nothing of masks.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import calls deprecated functions of torch
        from fvcore.nn import FlopCountAnalysis
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    shape = (1, 3, 224, 224)
    dense, inputs = resnet50().eval(), torch.randn(shape)
    sparse = sparsify(dense, DENSITY)
    cases = {
        "fvcore": timed(lambda: FlopCountAnalysis(dense, inputs).total()),
        "dense": timed(lambda: flop_report(dense, shape)),
        "sparse": timed(lambda: flop_report(sparse, shape)),
    }
    seconds = interleave(cases, repeats)
    return [
        Row("ResNet-50: fvcore / flop_report", ">= 3", ratio(seconds, "fvcore", "dense")),
        Row("ResNet-50: fvcore (dense) / flop_report (sparse)", ">= 3", ratio(seconds, "fvcore", "sparse")),
    ]


def memory_table() -> str:
    """Peak tensor bytes of one ordinary ResNet-18 training step, sparse over dense."""
    dense = dense_trainer(small_model(), small_batch())
    sparse = sparse_trainer(small_model(), small_batch(), RigL())
    masks = sum(mask.nbytes for mask in sparse.model.updater.masks.values())
    weights = sum(sparse.model.get_parameter(name).nbytes for name in sparse.model.updater.masks)
    dense_peak, sparse_peak = peak_bytes(dense), peak_bytes(sparse)
    rows = [
        ("peak of a step: masked / dense", f"{1 + masks / dense_peak:.3f}", f"{sparse_peak / dense_peak:.3f}"),
        ("masks / the weights they mask", "0.250", f"{masks / weights:.3f}"),
    ]
    size = f"dense peak {dense_peak / 1e6:.1f} MB, masked peak {sparse_peak / 1e6:.1f} MB, masks {masks / 1e6:.1f} MB"
    return tabulate(rows, ["ResNet-18 memory", "dense + masks", "ratio"], "github", disable_numparse=True) + "\n\n" + size


def peak_bytes(trainer: Trainer) -> int:
    """What a step holds at its start, and the most that it allocates on top, by the profiler's memory events."""
    for _ in range(2):
        trainer.step()
    trainer.optimizer.zero_grad()
    state = [t for s in trainer.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    held = sum(t.nbytes for t in [*trainer.model.parameters(), *trainer.model.buffers(), *state])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        trainer.step()
    results = profiled.profiler.kineto_results
    events = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    extra = peak = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        extra += change
        peak = max(peak, extra)
    return held + peak


def time_table(rows: list[Row]) -> str:
    """The rows as text."""
    cells = [(r.name, r.goal, shown(r.ratio), f"{r.ratio.ms:.1f} / {r.ratio.base_ms:.1f}") for r in rows]
    return tabulate(cells, ["time", "goal", "ratio (quartiles)", "ms"], "github", disable_numparse=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30, help="rounds of a ResNet-18 row; others take a third")
    parser.add_argument("--no-peer", action="store_true", help="leave other libraries out")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error("--repeats must be at least 2")
    few = max(2, args.repeats // 3)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads, {args.repeats} and {few} rounds\n")
    rows = [*small_rows(args.repeats), *(row for name in LARGE for row in large_rows(name, few)), *update_rows(few)]
    rows += [*compiled_rows(few), *ddp_rows(few), sparsify_row(few), *report_rows(few), file_row(few)]
    print(time_table(rows), end="\n\n")
    print(memory_table(), flush=True)
    if not args.no_peer:
        found = measure(few)
        print(f"\n{ratio_table(found)}\n\n{feature_table(found)}")


if __name__ == "__main__":
    main()
