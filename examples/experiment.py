"""The experiments of the papers, one command each: every run is written as JSON, the whole as a table and plots.

python examples/experiment.py methods --task digits            # every method at several densities
python examples/experiment.py methods --task cifar10 --data ~/cifar10
python examples/experiment.py distributions --task chars       # ERK against uniform, at equal parameters and equal FLOPs
python examples/experiment.py redistribution --task cifar10 --data ~/cifar10
python examples/experiment.py longer --task cifar100 --data ~/cifar100     # RigL 1x, 2x, 3x
python examples/experiment.py masks --task cifar10 --data ~/cifar10        # lottery tickets and re-used masks
python examples/experiment.py search --task digits             # Optuna over drop fraction and interval
python examples/experiment.py methods --task imagenet --data ~/imagenet --methods rigl --densities 0.2 0.1

An experiment that was interrupted goes on where it was when it is started again. --quick runs all of it on little data.
"""

import argparse
import json
import multiprocessing
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from plots import plot_densities, plot_scores
from tabulate import tabulate
from tasks import TASKS
from tqdm import tqdm
from train import METHODS, Run, train

from passes.masking.kernels import KERNELS

Results = list[dict[str, Any]]


def grid(experiment: str, options: argparse.Namespace) -> list[Run]:
    """List the runs of an experiment."""
    base = [Run(options.task, density=density, seed=seed) for density in options.densities for seed in range(options.seeds)]
    if experiment == "methods":
        runs = [replace(run, method=method) for method in options.methods for run in base]
        once = {"dense": 1.0, "nm": 0.5}  # methods that have one density
        return list(dict.fromkeys(replace(r, density=once.get(r.method, r.density)) for r in runs))
    variants: dict[str, list[dict[str, Any]]] = {
        "distributions": [{"distribution": "uniform"}, {"distribution": "constant"}, {}, {"flops": True}],
        "redistribution": [
            {"method": m, "distribution": d} for d in ("uniform", "erk") for m in ("rigl", "rigl-sg", "rigl-sm")
        ],
        "longer": [{"longer": x} for x in (1.0, 2.0, 3.0)] + [{"method": "gmp-global"}],
        "masks": [{"method": m} for m in ("rigl", "re-init", "static", "gmp-global", "lottery")],
    }
    return [replace(run, **variant) for variant in variants[experiment] for run in base]


def run_all(runs: Iterable[Run], options: argparse.Namespace) -> Results:
    """Train every run that has no result yet, on several processes, and return all results in order."""
    runs, context = list(runs), multiprocessing.get_context("spawn")
    args = (options.results, options.data, options.quick, options.workers == 1)
    if options.workers == 1:
        return [train(run, *args) for run in runs]
    done: dict[Run, dict[str, Any]] = {}
    with ProcessPoolExecutor(options.workers, context, _one_thread) as pool:
        futures = {pool.submit(train, run, *args): run for run in runs}
        try:
            for future in tqdm(as_completed(futures), total=len(runs), desc="runs", disable=None):
                done[futures[future]] = future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [done[run] for run in runs]


def _one_thread() -> None:
    torch.set_num_threads(1)


def search(options: argparse.Namespace) -> Results:
    """Search drop fraction and interval of RigL with Optuna, on validation data, as the reproduction did.

    The study's file resumes it.
    """
    import optuna

    task, base = TASKS[options.task], Run(options.task, density=options.densities[0], validation=True, kernels=options.kernels)
    options.results.mkdir(parents=True, exist_ok=True)
    better = "maximize" if task.metric == "accuracy" else "minimize"
    storage = f"sqlite:///{options.results / 'search.db'}"
    study = optuna.create_study(storage=storage, study_name=options.task, direction=better, load_if_exists=True)
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))  # goes on, rather than over the same trials again

    def objective(trial: Any) -> float:
        interval = trial.suggest_int("interval", max(1, task.interval // 2), 10 * task.interval, log=True)
        alpha = round(trial.suggest_float("drop_fraction", 0.1, 0.6, step=0.1), 1)
        runs = [replace(base, seed=seed, interval=interval, drop_fraction=alpha) for seed in range(options.seeds)]
        return statistics.mean(result[task.metric] for result in run_all(runs, options))

    ended = sum(trial.state.is_finished() for trial in study.trials)
    study.optimize(objective, n_trials=max(0, (2 if options.quick else options.trials) - ended))
    print(f"best of {len(study.trials)} trials: {study.best_params}, {task.metric} {study.best_value:.3f}")
    return [json.loads(path.read_text()) for path in sorted(options.results.glob(f"{options.task}*.json"))]


def summarize(results: Results, metric: str) -> list[dict[str, Any]]:
    """Group results over seeds: one row per variant and density, with mean and deviation."""
    groups = defaultdict(list)
    for result in results:
        groups[json.dumps({**result["run"], "seed": 0}, sort_keys=True)].append(result)
    rows = []
    for group in groups.values():
        values = [result[metric] for result in group]
        run = Run(**group[0]["run"])
        rows.append(
            {
                "variant": variant_of(run),
                "density": run.density,
                "mean": statistics.mean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
                "seeds": len(values),
                **{
                    k: statistics.mean(r[k] for r in group)
                    for k in ("kept", "inference_ratio", "training_ratio", "cpu_seconds")
                },
            }
        )
    return rows


def variant_of(run: Run) -> str:
    """Name what distinguishes a run besides its density and seed."""
    parts = [run.method, "(same FLOPs as uniform)" if run.flops else f"({run.distribution})"]
    parts = parts[:1] if run.method in ("dense", "small-dense", "nm") else parts
    parts += [f"kernels={run.kernels}"] if run.kernels != "masked" else []
    parts += [f"{run.longer:g}x"] if run.longer != 1 else []
    parts += [f"every {run.interval}, {run.drop_fraction:g}"] if run.interval else []
    return " ".join(parts)


def table(rows: list[dict[str, Any]], metric: str) -> str:
    """Return the rows as text."""
    cells = [
        (
            r["variant"],
            f"{r['density']:g}",
            f"{r['kept']:.3f}",
            f"{r['mean']:.2f} +- {r['deviation']:.2f}",
            f"{r['training_ratio']:.3f}",
            f"{r['inference_ratio']:.3f}",
            f"{r['cpu_seconds']:.0f}",
        )
        for r in sorted(rows, key=lambda r: (-r["density"], r["variant"]))
    ]
    head = ("variant", "density", "kept", metric, "training FLOPs", "inference FLOPs", "CPU seconds")
    return tabulate(cells, head, "github", disable_numparse=True)


def main(argv: list[str] | None = None) -> None:
    """Run one experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("methods", "distributions", "redistribution", "longer", "masks", "search")
    every = ["dense", "small-dense", *METHODS, "lottery", "re-init"]
    parser.add_argument("experiment", choices=names)
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--data", type=Path, help="folder of the data set, or a text file for chars")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.2, 0.1, 0.05])
    parser.add_argument("--methods", nargs="+", choices=every, default=every, metavar="METHOD", help=", ".join(every))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=30, help="of the search")
    parser.add_argument("--workers", type=int, default=1 if torch.cuda.is_available() else os.cpu_count())
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument(
        "--kernels", choices=KERNELS, default="masked", help="auto and sparse: with kept weights only, on a CPU"
    )
    parser.add_argument("--quick", action="store_true", help="one epoch on little data, one seed, two densities")
    options = parser.parse_args(argv)
    if options.quick:
        options.seeds, options.densities = 1, options.densities[:2]
    options.results = options.results / options.experiment / f"{options.task}{'-quick' * options.quick}"
    runs = [] if options.experiment == "search" else grid(options.experiment, options)
    runs = [replace(run, kernels=options.kernels) for run in runs]
    results = run_all(runs, options) if runs else search(options)
    report(results, options.task, options.results)


def report(results: Results, task: str, folder: Path) -> list[dict[str, Any]]:
    """Print the table of an experiment, write it as JSON, and draw its plots."""
    metric = TASKS[task].metric
    rows = summarize(results, metric)
    (folder / "summary.json").write_text(json.dumps(rows, indent=1))
    print(table(rows, metric))
    plot_scores(rows, metric, folder)
    plot_densities(results, folder / "densities.png")
    print(f"results and plots are in {folder}/")
    return rows


if __name__ == "__main__":
    main()
