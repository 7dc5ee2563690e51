"""The study: every method at six densities on digits and on the language model, and what of the reproduction's claims holds.

A third task is large enough to be timed: there layers train with kept weights only (`kernels="auto"`), beside masked ones.

python examples/study.py            # within 90 minutes on 2 cores; goes on where it was interrupted
python examples/study.py --quick    # minutes: one seed, two densities, little data

It writes STUDY.md and its plots beside this file, and the runs as JSON into results/study/. What people wrote about the figures
is in study_comments.md.
"""

import argparse
import math
import os
import re
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from experiment import Results, run_all, summarize, table
from plots import plot_densities, plot_scores
from tasks import TASKS
from train import METHODS, Run

HERE = Path(__file__).parent
DENSITIES = [0.5, 0.2, 0.1, 0.05, 0.02, 0.01]
SEEDS = {"digits": 5, "chars-small": 3, "digits-wide": 2}
TIMED = "digits-wide"


def runs_of(task: str, densities: list[float], seeds: int) -> list[Run]:
    """List every run of a task: all methods, both distributions, equal FLOPs, longer training; fewer where time is measured."""
    if task == TIMED:
        sparse = [Run(task, density=d, seed=seed) for d in densities if 0.02 < d < 0.2 for seed in range(seeds)]
        fast = [replace(run, method=m, kernels="auto") for m in _TIMED_METHODS for run in sparse]
        return [*(Run(task, "dense", 1.0, seed=seed) for seed in range(seeds)), *sparse, *fast]
    base = [Run(task, density=density, seed=seed) for seed in range(seeds) for density in densities]
    changes: list[dict[str, Any]] = [{"method": method} for method in METHODS]
    changes += [{"method": method} for method in ("small-dense", "lottery", "re-init")]
    changes += [{"distribution": "uniform", "method": m} for m in ("rigl", "rigl-sg", "rigl-sm")]
    changes += [{"distribution": "constant"}]
    changes += [{"flops": True}, {"longer": 2.0}, {"longer": 3.0}]
    runs = [replace(run, **change) for change in changes for run in base]
    runs += [Run(task, "dense", 1.0, seed=seed) for seed in range(seeds)]
    one_density = [replace(run, density=0.5) if run.method == "nm" else run for run in runs]
    return sorted(dict.fromkeys(one_density), key=lambda run: run.method in ("lottery", "re-init"))  # after their parents


_TIMED_METHODS = ("rigl", "static", "set", "srigl", "rigl-struct", "rigl-2x1", "rigl-4x1")


@dataclass(frozen=True)
class Claim:
    """One claim of the papers: a variant is better than another at equal density, or not worse."""

    text: str
    better: dict[str, Any]
    than: dict[str, Any]
    not_worse: bool = False


CLAIMS = (
    Claim("RigL beats static masks", {}, {"method": "static"}),
    Claim("RigL beats the small dense network of as many parameters", {}, {"method": "small-dense"}),
    Claim("RigL beats SET", {}, {"method": "set"}),
    Claim("RigL is not worse than SNFS, which costs more", {}, {"method": "snfs"}, not_worse=True),
    Claim("RigL beats SNIP", {}, {"method": "snip"}),
    Claim("Pruning beats RigL trained as long", {"method": "gmp-global"}, {}),
    Claim("RigL trained 3 times as long is not worse than pruning", {"longer": 3.0}, {"method": "gmp-global"}, True),
    Claim("ERK beats uniform, which keeps the first layer besides", {}, {"distribution": "uniform"}),
    Claim("ERK beats the same density in every layer", {}, {"distribution": "constant"}),
    Claim("Uniform beats ERK at equal FLOPs", {"distribution": "uniform"}, {"flops": True}),
    Claim(
        "Redistribution helps the uniform distribution",
        {"distribution": "uniform", "method": "rigl-sg"},
        {"distribution": "uniform"},
    ),
    Claim("A lottery ticket falls short of pruning itself", {"method": "gmp-global"}, {"method": "lottery"}),
    Claim("RigL beats its own final topology trained from fresh weights", {}, {"method": "re-init"}),
    Claim("Whole kernels are worse than single weights", {}, {"method": "rigl-struct"}),
    Claim("A constant fan-in is not worse than RigL", {"method": "srigl"}, {}, True),
    Claim("Patterns that 2 outputs share are not worse than single weights", {"method": "rigl-2x1"}, {}, True),
    Claim("Patterns that 4 outputs share are not worse than single weights", {"method": "rigl-4x1"}, {}, True),
)
_AUTO = {"kernels": "auto"}
TIMED_CLAIMS = (
    Claim("Training with kept weights only is not worse than with masked ones", _AUTO, {}, True),
    *(replace(c, better=_AUTO | c.better, than=_AUTO | c.than) for c in CLAIMS[-3:]),
    Claim("RigL beats static masks", _AUTO, {"method": "static"} | _AUTO),
)


def judge(claim: Claim, results: Results, task: str) -> str:
    """Say at how many densities a claim holds, by the mean difference of equal seeds and its standard error."""
    metric = TASKS[task].metric
    sign = 1 if metric == "accuracy" else -1
    scores = {Run(**result["run"]): sign * result[metric] for result in results}
    holds, fails, gaps, moved = [], [], [], False
    by_density = defaultdict(list)
    for run in scores:
        if run == Run(task, density=run.density, seed=run.seed):
            pair = scores.get(replace(run, **claim.better)), scores.get(replace(run, **claim.than))
            if None not in pair:
                by_density[run.density].append(pair[0] - pair[1])
    for density, differences in sorted(by_density.items(), reverse=True):
        mean = statistics.mean(differences)
        error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
        gaps.append(f"{density:g}: {sign * mean:+.2f}")
        moved |= any(differences)
        if mean > 2 * error or (claim.not_worse and mean > -2 * error):
            holds.append(density)
        elif mean < -2 * error:
            fails.append(density)
    if not moved:
        return f"| {claim.text} | no difference here | | | |"
    verdict = "holds" if len(holds) == len(gaps) else "fails" if len(fails) == len(gaps) else "in part"
    verdict = verdict if holds or fails else "undecided"
    return f"| {claim.text} | {verdict} | {_list(holds)} | {_list(fails)} | {', '.join(gaps)} |"


def _list(densities: list[float]) -> str:
    return ", ".join(f"{d:g}" for d in densities) or "-"


def write(results: dict[str, Results], quick: bool) -> str:
    """Compose the text of STUDY.md."""
    head = "# Study\n\nWritten by `make study`: every method on two real tasks that fit on two CPU cores.\n"
    seeds = ", ".join(f"{len({r['run']['seed'] for r in found})} seeds of {task}" for task, found in results.items())
    total = sum(len(found) for found in results.values())
    work = sum(r["cpu_seconds"] for found in results.values() for r in found) / 60
    parts = [
        head,
        f"{total} runs, {seeds}; {work:.0f} minutes of CPU time, so {work / 2:.0f} on two cores (torch "
        f"{torch.__version__}). Mean and standard deviation over seeds; FLOPs are relative to dense training "
        f"and inference, counted from the masks the runs had. All sparse runs start from fan-in rescaled weights.",
        "\n" + (HERE / "study_comments.md").read_text().strip() if not quick else "",
    ]
    return "\n".join([*parts, *(section(task, found) for task, found in results.items())]) + "\n"


def section(task: str, found: Results) -> str:
    """Compose the part of STUDY.md on one task."""
    unit = "test accuracy in percent" if TASKS[task].metric == "accuracy" else "bits per character, lower is better"
    rows = summarize(found, TASKS[task].metric)
    return "\n".join(
        [
            f"\n## {task}: which claims hold\n",
            "A claim holds at a density if the mean difference over equal seeds exceeds two standard errors in its favour (for "
            "*not worse*: unless it does against it); it fails if the same is true against it.\n",
            "| claim | verdict | holds at | fails at | mean difference by density |\n|---|---|---|---|---|",
            *(judge(claim, found, task) for claim in (TIMED_CLAIMS if task == TIMED else CLAIMS)),
            f"\n## {task}: {unit}\n",
            f"![score over density](study/{task}/score-density.png)\n![score over FLOPs](study/{task}/score-flops.png)",
            f"![score over seconds](study/{task}/score-seconds.png)\n"
            if task == TIMED  # by methods that keep every layer's density
            else f"![densities over time](study/{task}/densities.png)\n",
            table(rows, TASKS[task].metric),
        ]
    )


def replaced(text: str, task: str, found: Results) -> str:
    """Return the text of STUDY.md with the part on one task written anew, or added."""
    begin = text.find(f"\n## {task}: which claims hold")
    if begin < 0:
        return text.rstrip("\n") + "\n" + section(task, found) + "\n"
    following = re.compile(rf"\n## (?!{re.escape(task)}:)").search(text, begin + 1)
    return text[:begin] + section(task, found) + "\n" + (text[following.start() :] if following else "")


def main(argv: list[str] | None = None) -> None:
    """Run the study and write its report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tasks", nargs="+", choices=SEEDS, default=list(SEEDS), help="write only what is on these anew")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--results", type=Path, default=Path("results/study"))
    parser.add_argument("--output", type=Path, default=HERE)
    options = parser.parse_args(argv)
    options.data = None
    options.results = options.results / "quick" if options.quick else options.results
    started, results = time.monotonic(), {}
    for task in options.tasks:
        runs = runs_of(task, [0.5, 0.1] if options.quick else DENSITIES, 1 if options.quick else SEEDS[task])
        results[task] = run_all(runs, options)
        folder = options.output / "study" / task
        folder.mkdir(parents=True, exist_ok=True)
        plot_scores(summarize(results[task], TASKS[task].metric), TASKS[task].metric, folder)
        plot_densities([r for r in results[task] if r["run"]["distribution"] == "erk"], folder / "densities.png")
    minutes = (time.monotonic() - started) / 60
    file = options.output / "STUDY.md"
    text = write(results, options.quick)
    if len(options.tasks) < len(SEEDS) and file.exists():
        text = file.read_text()
        for task, found in results.items():
            text = replaced(text, task, found)
    file.write_text(text)
    print(f"{options.output / 'STUDY.md'} written after {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
