"""Views of the rewritten graph: a table, and a drawing with the masked nodes standing out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import fx, nn

from passes.capture.captured import Captured
from passes.counting.tally import tally
from passes.masking.mask import BESIDE, Mask, masks_of
from sparsify.saving.files import replacing

_DRAWINGS = (".svg", ".png", ".pdf", ".dot")


@dataclass(frozen=True)
class NodeView:
    """What the views show of one node."""

    node: fx.Node
    region: str
    target: str
    weights: tuple[str, ...]  # names of the masked weights it uses
    shape: str
    density: str
    macs: int | None  # None where no inputs were given


def _views(model: nn.Module, inputs: Any) -> list[NodeView]:
    macs = None if inputs is None else tally(model, inputs).nodes
    views = []
    for region, module in model.named_modules():
        if isinstance(module, Captured):
            names = {mask: name for name, mask in masks_of(module).items()}
            inside = module.named_modules(remove_duplicate=False)  # tied weights have several paths
            masks = {path: (names[m], m) for path, m in inside if isinstance(m, Mask) and m in names}
            for node in module.graph.nodes:
                views.append(_view(node, region, masks, None if macs is None else macs.get((region, node.name), 0)))
    if not views:
        raise ValueError("The model has no captured graph: pass one that sparsify() returned.")
    return views


def _view(node: fx.Node, region: str, masks: dict[str, tuple[str, Mask]], macs: int | None) -> NodeView:
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    inside = node.op == "call_module" and node.kwargs.get("role") != BESIDE
    used = [m for path, m in masks.items() if inside and (path == target or path.startswith(f"{target}."))]
    shapes = ", ".join("x".join(map(str, mask.mask.shape)) for _, mask in used)
    densities = ", ".join(f"{mask.density:.4f}" for _, mask in used)
    return NodeView(node, region, target, tuple(name for name, _ in used), shapes, densities, macs)


def graph_table(model: nn.Module, inputs: Any = None) -> str:
    """Return the rewritten graph of the current mode as a table, one line per node; masked nodes start with `*`.

    Args:
        model: a model that `sparsify` returned.
        inputs: what `flop_report` takes; adds the dense MACs of each node (in evaluation).

    Returns:
        Columns: node, operation, target, weight shape, density, dense MACs.

    Raises:
        ValueError: the model has no captured graph, or the inputs do not fit.

    Example:
        >>> from sparsify import sparsify
        >>> model = sparsify(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), density=0.5)
        >>> print(graph_table(model, (1, 4)))  # doctest: +NORMALIZE_WHITESPACE
        node        op           target    weight    density    dense MACs
        ----------  -----------  --------  --------  ---------  ------------
        input_1     placeholder  input
        * masked_0  call_module  0         8x4       0.5000     32
        _1          call_module  1
        output      output       output
    """
    rows = []
    for view in _views(model, inputs):
        name = f"{view.region}: {view.node.name}" if view.region else view.node.name
        macs = f"{view.macs:,}" if view.macs else ""
        rows.append((f"{'* ' if view.weights else ''}{name}", view.node.op, view.target, view.shape, view.density, macs))
    return tabulate(rows, headers=("node", "op", "target", "weight", "density", "dense MACs"), disable_numparse=True)


def draw_graph(model: nn.Module, path: str, inputs: Any = None) -> None:
    """Draw the rewritten graph of the current mode with graphviz; masked nodes are filled.

    Args:
        model: a model that `sparsify` returned.
        path: of the file to write; its ending chooses the format (.svg, .png, .pdf, .dot).
        inputs: what `flop_report` takes; adds the dense MACs of each node.

    Raises:
        ImportError: pygraphviz, the extra `plots`, is not installed.
        ValueError: the model has no captured graph, the inputs do not fit, or the ending is another one.
    """
    ending = Path(path).suffix.lower()
    if ending not in _DRAWINGS:
        raise ValueError(f"{path} ends in {ending or 'nothing'}; a drawing is one of {', '.join(_DRAWINGS)}.")
    try:
        import pygraphviz
    except ImportError as error:
        raise ImportError("Drawing a graph needs pygraphviz: pip install 'sparsify-fx[plots]'") from error
    drawing = pygraphviz.AGraph(directed=True)
    drawing.node_attr.update(shape="box", style="rounded,filled", fillcolor="white", fontname="Helvetica", fontsize="10")
    for view in _views(model, inputs):
        macs = f"{view.macs:,} dense MACs" if view.macs else ""
        weight = f"{view.shape} at {view.density}" if view.weights else ""
        label = "\n".join(line for line in (view.node.name, f"{view.node.op}: {view.target}", weight, macs) if line)
        drawing.add_node(f"{view.region}/{view.node.name}", label=label, **({"fillcolor": "#ffb570"} if view.weights else {}))
        for source in view.node.all_input_nodes:
            drawing.add_edge(f"{view.region}/{source.name}", f"{view.region}/{view.node.name}")
    with replacing(path) as partial:
        drawing.draw(str(partial), format=ending.removeprefix("."), prog="dot")
