"""Plots of the experiments: the score against density, training FLOPs and seconds, and every layer's density over time."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_MARKERS = "osv^<>DPX*hp"


def plot_scores(rows: list[dict[str, Any]], metric: str, folder: Path) -> None:
    """Draw `score-density.png`, `score-flops.png` and `score-seconds.png`: means with deviations, one line per variant."""
    for key, label, name in (
        ("density", "density", "score-density.png"),
        ("training_ratio", "training FLOPs / dense", "score-flops.png"),
        ("cpu_seconds", "seconds of CPU time", "score-seconds.png"),
    ):
        figure, axes = plt.subplots(figsize=(11, 6), layout="constrained")
        groups = defaultdict(list)
        for row in rows:
            groups[row["variant"]].append(row)
        for i, (variant, group) in enumerate(groups.items()):
            group.sort(key=lambda row: row[key])
            means, spread = [row["mean"] for row in group], [row["deviation"] for row in group]
            style = {"marker": _MARKERS[i % len(_MARKERS)], "color": plt.get_cmap("tab20")(i % 20), "capsize": 2}
            axes.errorbar([row[key] for row in group], means, spread, label=variant, linewidth=1, **style)
        axes.set(xscale="log", xlabel=label, ylabel="test accuracy (%)" if metric == "accuracy" else "bits per character")
        figure.legend(fontsize="small", loc="outside right upper")
        figure.savefig(folder / name, dpi=120)
        plt.close(figure)


def plot_densities(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the density of every layer over the steps, one panel per variant whose densities move.

    Of the runs of a variant it shows one: of the first seed, at the middle density.
    """
    moving = {}
    for result in results:
        run = result["run"]
        if len(result["densities"]) > 1 and run["seed"] == 0:
            moving.setdefault((run["method"], run["distribution"]), []).append(result)
    if not moving:
        return
    columns = min(3, len(moving))
    rows = -(-len(moving) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(4 * columns, 3 * rows), layout="constrained", squeeze=False)
    for axes, ((method, distribution), group) in zip(panels.flat, moving.items(), strict=False):
        result = group[len(group) // 2]
        steps = [step for step, _ in result["densities"]]
        for layer in result["densities"][0][1]:
            values = [densities[layer] for _, densities in result["densities"]]
            axes.step([*steps, result["steps"]], [*values, values[-1]], where="post", label=layer.removesuffix(".weight"))
        axes.set(title=f"{method} ({distribution}) at {result['run']['density']:g}", xlabel="step", ylabel="density")
    for axes in panels.flat[len(moving) :]:
        axes.axis("off")
    if len(result["densities"][0][1]) <= 8:
        panels.flat[0].legend(fontsize="x-small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
