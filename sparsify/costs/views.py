"""Views of the rewritten graph: a table, and a drawing with the masked nodes standing out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import fx, nn

from passes.capture.captured import Captured
from passes.counting.tally import tally
from passes.masking.layers import Masked
from passes.masking.mask import BESIDE, Mask, masks_of
from sparsify.saving.files import replacing

_DRAWINGS = (".svg", ".png", ".pdf", ".dot")


@dataclass(frozen=True)
class NodeView:
    """What the views show of one node.

    Attributes:
        id: region and name.
        name: of the node, after that of its region.
        path: of the module whose code it stands for.
        op: what fx calls its kind.
        target: what it calls or reads.
        inputs: ids of the nodes that it reads.
        weights: names of the masked weights it uses.
        shape, density: of these.
        macs: dense, in evaluation; None where no inputs were given.
    """

    id: str
    name: str
    path: str
    op: str
    target: str
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    shape: str
    density: str
    macs: int | None


def node_views(model: nn.Module, inputs: Any = None) -> list[NodeView]:
    """Return every node of the graphs of the current mode, and each masked module that Python code calls.

    Args:
        model: a model that `sparsify` returned.
        inputs: what `flop_report` takes; adds dense MACs.

    Raises:
        ValueError: the model has no captured graph and no masked module, or the inputs do not fit.
    """
    costs = None if inputs is None else tally(model, inputs)
    names, views, called = {mask: name for name, mask in masks_of(model).items()}, [], set()
    for region, module in model.named_modules():
        masks = [(path, m) for path, m in module.named_modules(remove_duplicate=False) if isinstance(m, Mask) and m in names]
        if isinstance(module, Captured):
            for node in module.graph.nodes:
                target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
                inside = node.op == "call_module" and node.kwargs.get("role") != BESIDE
                used = [m for path, m in masks if inside and (path == target or path.startswith(f"{target}."))]
                macs = None if costs is None else costs.nodes.get((region, node.name), 0)
                path = _joined(region, _path(node))
                sources = [_joined(region, n.name, "/") for n in node.all_input_nodes]
                view = _view(_joined(region, node.name, "/"), path, node.op, target, sources, used, names, macs)
                views.append(replace(view, name=f"{region}: {node.name}" if region else node.name))
                called |= set(module.get_submodule(target).modules()) if node.op == "call_module" else set()
        elif isinstance(module, Masked) and masks and module not in called:
            weights = [m for path, m in masks if "." not in path]
            macs = None if costs is None else sum(costs.weights.get(names[m], 0) for m in weights)
            views += [_view(region, region, "call_module", region, (), weights, names, macs)] if weights else []
    if not views:
        raise ValueError("The model has no captured graph: pass one that sparsify() returned.")
    return views


def _path(node: fx.Node) -> str:
    """Return the path of the module, inside its region, whose code a node stands for."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        return list(stack.values())[-1][0]
    return str(node.target) if node.op == "call_module" else ""


def _joined(first: str, second: str, by: str = ".") -> str:
    return f"{first}{by}{second}" if first and second else first or second


def _view(
    key: str, path: str, op: str, target: str, inputs: Iterable[str], used: list[Mask], names: dict[Mask, str], macs: int | None
) -> NodeView:
    shapes = ", ".join("x".join(map(str, mask.mask.shape)) for mask in used)
    densities = ", ".join(f"{mask.density:.4f}" for mask in used)
    return NodeView(key, key, path, op, target, tuple(inputs), tuple(names[m] for m in used), shapes, densities, macs)


def graph_table(model: nn.Module, inputs: Any = None) -> GraphTable:
    """Return the rewritten graph of the current mode as a table, one line per node; masked nodes start with `*`.

    Args:
        model: a model that `sparsify` returned.
        inputs: what `flop_report` takes; adds the dense MACs of each node (in evaluation).

    Returns:
        Text, with the columns node, operation, target, weight shape, density, dense MACs; a notebook shows a table.

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
    for view in node_views(model, inputs):
        macs = f"{view.macs:,}" if view.macs else ""
        rows.append((f"{'* ' if view.weights else ''}{view.name}", view.op, view.target, view.shape, view.density, macs))
    return GraphTable(rows)


class GraphTable(str):
    """A table of a graph: text, and as a table in a notebook."""

    _rows: list[tuple[str, ...]]

    def __new__(cls, rows: list[tuple[str, ...]]) -> GraphTable:
        """Return the text of rows."""
        result = super().__new__(cls, tabulate(rows, headers=_HEADS, disable_numparse=True))
        result._rows = rows
        return result

    def _repr_html_(self) -> str:
        return tabulate(self._rows, headers=_HEADS, tablefmt="html", disable_numparse=True)


_HEADS = ("node", "op", "target", "weight", "density", "dense MACs")


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
    for view in node_views(model, inputs):
        macs = f"{view.macs:,} dense MACs" if view.macs else ""
        weight = f"{view.shape} at {view.density}" if view.weights else ""
        label = "\n".join(line for line in (view.name, f"{view.op}: {view.target}", weight, macs) if line)
        drawing.add_node(view.id, label=label, **({"fillcolor": "#ffb570"} if view.weights else {}))
        for source in view.inputs:
            drawing.add_edge(source, view.id)
    with replacing(path) as partial:
        drawing.draw(str(partial), format=ending.removeprefix("."), prog="dot")
