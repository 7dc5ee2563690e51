"""Plots: the report as a picture. Needs matplotlib, the extra `plots`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    figure = _figure(len(bars), 7)
    names, densities, dense, sparse = zip(*bars, strict=True) if bars else ((), (), (), ())
    positions = range(len(bars))
    density, macs = figure.subplots(2, 1, sharex=True)
    density.bar(positions, densities, color="tab:blue")
    density.set(ylabel="density", ylim=(0, 1.02), title=title)
    macs.bar([p - 0.2 for p in positions], dense, width=0.4, label="dense", color="tab:gray")
    macs.bar([p + 0.2 for p in positions], sparse, width=0.4, label="sparse", color="tab:orange")
    macs.set(ylabel="MACs")
    macs.legend()
    _label(macs, names)
    _write(figure, path)


def plot_speed(rows: Sequence[tuple[str, float, float]], title: str, path: str) -> None:
    """Draw how many times faster every layer is, as predicted and as measured.

    Args:
        rows: name, predicted and measured speed of each layer, from left to right.
        title: of the picture.
        path: of the file to write; its ending chooses the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure(len(rows), 5)
    names, predicted, measured = zip(*rows, strict=True) if rows else ((), (), ())
    speed = figure.subplots()
    speed.bar([p - 0.2 for p in range(len(rows))], predicted, width=0.4, label="predicted", color="tab:gray")
    speed.bar([p + 0.2 for p in range(len(rows))], measured, width=0.4, label="measured", color="tab:green")
    speed.axhline(1, color="black", linewidth=0.8)
    speed.set(ylabel="times faster than dense", title=title)
    speed.legend()
    _label(speed, names)
    _write(figure, path)


def _figure(count: int, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'sparsify-fx[plots]'") from error
    return Figure(figsize=(max(6.0, 0.28 * count + 2), height), layout="constrained")


def _label(axes: Any, names: Sequence[str]) -> None:
    axes.set(xticks=range(len(names)))
    axes.set_xticklabels([name.removesuffix(".weight") for name in names], rotation=90, fontsize=7)


def _write(figure: Any, path: str) -> None:
    from matplotlib import rcParams

    path = path if Path(path).suffix else f"{path}.{rcParams['savefig.format']}"
    with replacing(path) as partial:
        figure.savefig(partial, format=Path(path).suffix.removeprefix("."))
