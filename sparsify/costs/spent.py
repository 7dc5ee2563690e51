"""Spent: what a run has cost, from the masks that it really had, beside its forecast and the published formula."""

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate
from torch import nn

from sparsify.costs.report import FlopReport
from sparsify.methods.costs import Spending, forecast, spend
from sparsify.training.base import UpdaterBase
from sparsify.training.lookup import updater_of


@dataclass(frozen=True)
class CostRow:
    """One stretch of training over which the topology's counts stayed."""

    step: int  # they hold from the end of it on
    density: float  # kept fraction over all masked weights
    inference_ratio: float  # inference FLOPs relative to dense
    training_ratio: float  # training FLOPs up to this step, relative to as many dense steps


@dataclass(frozen=True)
class CostLedger:
    """What `cost_ledger` returns. All figures are per sample: multiply by the batch size for the run's."""

    method: str
    dense_macs: int  # of one inference
    spending: Spending
    rows: tuple[CostRow, ...]
    forecast: float  # of the whole run, before it began
    published: float  # by the method's closed form, at its final density

    @property
    def training_ratio(self) -> float:
        """Training FLOPs so far, relative to as many dense steps."""
        return self.spending.ratio

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain Python values, ready for JSON."""
        return {**asdict(self), "training_ratio": self.training_ratio}

    def __str__(self) -> str:
        """Return the table that people read."""
        parts = asdict(self.spending)
        steps = parts.pop("steps")
        lines = [(name.replace("_", " "), f"{n * self.dense_macs:.4g}", f"{n / 3 / steps:.4f}") for name, n in parts.items()]
        lines.append(("total", f"{self.training_ratio * 3 * steps * self.dense_macs:.4g}", f"{self.training_ratio:.4f}"))
        table = tabulate(lines, headers=("training", "MACs per sample", "of dense"), disable_numparse=True)
        return "\n".join(
            [
                table,
                "",
                f"method {self.method}, {steps:,} steps, {len(self.rows)} sets of counts "
                f"(1 MAC = 1 multiply-accumulate; FLOPs = 2 * MACs)",
                f"forecast {self.forecast:.4f} for the whole run; {self.published:.4f} by the published formula",
            ]
        )


def inference_ratio(updater: UpdaterBase, report: FlopReport, nonzeros: Mapping[str, int]) -> float:
    """Return the inference FLOPs relative to dense with these counts of kept weights."""
    layers = [x for x in report.layers if x.name in updater.goals]
    # A layer that was replaced has no count any more, and is dense.
    saved = sum(x.dense_macs - x.dense_macs * (nonzeros[x.name] or x.params) // x.params for x in layers)
    return 1 - saved / report.dense_macs if report.dense_macs else 1.0


def training_ratios(updater: UpdaterBase, report: FlopReport) -> list[float]:
    """Return the training FLOPs up to every update but the first entry of the history, and up to now, relative to dense."""
    ratios = [(entry.step, inference_ratio(updater, report, entry.nonzeros)) for entry in updater.history]
    return [spending.ratio for spending in spend(ratios, updater.method.updates, updater.step, updater.total_steps)]


def ledger_of(model: nn.Module, report: FlopReport) -> CostLedger:
    """Add up what training has cost, from a model that was trained for a step at least and its report now."""
    updater = updater_of(model)
    assert updater is not None
    sizes = {x.name: x.params for x in report.layers if x.name in updater.goals}
    total = sum(sizes.values())
    topologies = [next(group) for _, group in itertools.groupby(updater.history, key=lambda entry: entry.nonzeros)]
    ratios = [(entry.step, inference_ratio(updater, report, entry.nonzeros)) for entry in topologies]
    method, schedule = updater.method, updater.total_steps
    spent = spend(ratios, method.updates, updater.step, schedule)
    so_far = [1.0, *(spending.ratio for spending in spent[:-1])]
    densities = [sum(entry.nonzeros[name] for name in sizes) / total for entry in topologies]
    rows = [CostRow(step, density, ratio, cost) for (step, ratio), density, cost in zip(ratios, densities, so_far, strict=True)]
    planned = {name: goal.target for name, goal in updater.goals.items()} if method.prunes else topologies[0].nonzeros
    return CostLedger(
        method.name,
        report.dense_macs,
        spent[-1],
        tuple(rows),
        forecast(method, inference_ratio(updater, report, planned), schedule),
        report.training_ratio,
    )
