"""Plots: the report as a picture. Needs matplotlib, the extra `plots`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparsify.files import replacing

if TYPE_CHECKING:
    from sparsify.report import FlopReport


def plot_report(report: FlopReport, path: str) -> None:
    """Draw density and MACs per layer, dense beside sparse.

    Args:
        report: what `flop_report` returned.
        path: of the file to write; its ending chooses the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'sparsify-fx[plots]'") from error
    layers = report.layers
    positions = range(len(layers))
    figure = Figure(figsize=(max(6.0, 0.28 * len(layers) + 2), 7), layout="constrained")
    density, macs = figure.subplots(2, 1, sharex=True)
    density.bar(positions, [layer.density for layer in layers], color="tab:blue")
    density.set(ylabel="density", ylim=(0, 1.02), title=f"{report.model}: {report.inference_ratio:.4f} of dense MACs")
    macs.bar([p - 0.2 for p in positions], [x.dense_macs for x in layers], width=0.4, label="dense", color="tab:gray")
    macs.bar(
        [p + 0.2 for p in positions], [x.sparse_macs for x in layers], width=0.4, label="sparse", color="tab:orange"
    )
    macs.set(ylabel="MACs", xticks=positions)
    macs.set_xticklabels([layer.name.removesuffix(".weight") for layer in layers], rotation=90, fontsize=7)
    macs.legend()
    path = path if Path(path).suffix else f"{path}.{rcParams['savefig.format']}"
    with replacing(path) as partial:
        figure.savefig(partial, format=Path(path).suffix.removeprefix("."))
