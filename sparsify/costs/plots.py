"""Plots: the report as a picture. Needs matplotlib, the extra `plots`."""

from collections.abc import Sequence
from pathlib import Path

from sparsify.saving.files import replacing

Bar = tuple[str, float, int, int]  # of one layer: name, density, dense MACs, sparse MACs


def plot_layers(bars: Sequence[Bar], title: str, path: str) -> None:
    """Draw density and MACs per layer, dense beside sparse.

    Args:
        bars: the layers, from left to right.
        title: of the picture.
        path: of the file to write; its ending chooses the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'sparsify-fx[plots]'") from error
    names, densities, dense, sparse = zip(*bars, strict=True) if bars else ((), (), (), ())
    positions = range(len(bars))
    figure = Figure(figsize=(max(6.0, 0.28 * len(bars) + 2), 7), layout="constrained")
    density, macs = figure.subplots(2, 1, sharex=True)
    density.bar(positions, densities, color="tab:blue")
    density.set(ylabel="density", ylim=(0, 1.02), title=title)
    macs.bar([p - 0.2 for p in positions], dense, width=0.4, label="dense", color="tab:gray")
    macs.bar([p + 0.2 for p in positions], sparse, width=0.4, label="sparse", color="tab:orange")
    macs.set(ylabel="MACs", xticks=positions)
    macs.set_xticklabels([name.removesuffix(".weight") for name in names], rotation=90, fontsize=7)
    macs.legend()
    path = path if Path(path).suffix else f"{path}.{rcParams['savefig.format']}"
    with replacing(path) as partial:
        figure.savefig(partial, format=Path(path).suffix.removeprefix("."))
