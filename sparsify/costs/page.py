"""Page: one HTML file of a report, that opens offline.

Cytoscape.js draws the graph, dagre lays it out and uPlot draws the charts; all are in `assets/vendor` and go into the file.
What the page shows is JSON beside them, and becomes text, never markup.
"""

import html
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from torch import nn

from sparsify.costs.report import FlopReport, Layer
from sparsify.costs.speed import SpeedReport
from sparsify.costs.spent import inference_ratio, training_ratios
from sparsify.costs.thumbnails import thumbnail
from sparsify.costs.views import NodeView, node_views
from sparsify.methods.how_many import steady_drop
from sparsify.training.lookup import updater_of

_SCRIPTS = ("vendor/cytoscape.min.js", "vendor/dagre.min.js", "vendor/uPlot.iife.min.js", "graph.js", "report.js")
_STYLES = ("vendor/uPlot.min.css", "report.css")


def page(model: nn.Module, reports: Mapping[str, FlopReport], speed: SpeedReport | None = None, notes: str = "") -> str:
    """Return the page of a report.

    Args:
        model: what the first report is of.
        reports: {what the switch calls it: a report on the same layers}; the first one is the model's own.
        speed: of the model.
        notes: text under everything.

    Returns:
        The text of an HTML file.
    """
    main, report = next(iter(reports.items()))
    content = {
        "title": f"{report.model}, {report.method}" if report.method != "none" else report.model,
        "subtitle": f"on inputs of {', '.join('x'.join(map(str, shape)) for shape in report.inputs)}; 1 MAC = 1 "
        f"multiply-accumulate, FLOPs = 2 MACs",
        "main": main,
        "variants": {name: _variant(r, speed if name == main else None) for name, r in reports.items()},
        "nodes": [_node(view) for view in _views(model)],
        "masks": _masks(model),
        "history": _history(model, report),
        "speed": speed and {k: v for k, v in speed.to_dict().items() if k != "layers"},
        "notes": notes.splitlines(),
    }
    # Inside a script element nothing but "<" could end it.
    data = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"title": html.escape(content["title"]), "styles": _text(_STYLES), "scripts": _text(_SCRIPTS), "data": data}
    text = _text(("page.html",))
    for name, part in parts.items():  # data last: what a model is named after cannot be taken for a place to fill
        text = text.replace(f"{{{{{name}}}}}", part, 1)
    return text


def _text(names: tuple[str, ...]) -> str:
    folder = files("sparsify.costs") / "assets"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


def _variant(report: FlopReport, speed: SpeedReport | None) -> dict[str, Any]:
    masked = [layer for layer in report.layers if layer.status == "masked"]
    names = ("density", "dense_macs", "sparse_macs", "inference_ratio", "training_ratio", "exact_training_ratio")
    totals = {name: getattr(report, name) for name in (*names, "dense_bytes", "sparse_bytes")}
    totals |= {"kept": sum(x.nonzeros for x in masked), "params": sum(x.params for x in masked)}
    return {"totals": totals, "layers": [_layer(x, speed) for x in report.layers]}


def _layer(layer: Layer, speed: SpeedReport | None) -> dict[str, Any]:
    row = {name: getattr(layer, name) for name in ("name", "op", "params", "density", "dense_macs", "sparse_macs")}
    row |= {"kept": layer.nonzeros, "shape": "x".join(map(str, layer.weight_shape or ())), "dead_outputs": layer.dead_outputs}
    row |= {"status": layer.status, "reason": layer.reason, "measured": 0.0, "kernel": ""}
    path = layer.name.removesuffix(".weight")
    found = next((x for x in speed.layers if x.name in (path, path.replace(".", "_"))), None) if speed else None
    if found:
        row |= {"measured": found.measured, "predicted": found.predicted, "kernel": found.kernel, "why": found.reason}
    return row


def _views(model: nn.Module) -> list[NodeView]:
    try:
        return node_views(model)
    except ValueError:  # a dense model, which has no graphs
        return []


def _node(view: NodeView) -> dict[str, Any]:
    parts = (view.path or view.name).split(".")
    own = ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])
    label = own if view.op == "call_module" else view.name.rpartition(": ")[2]
    block = view.path.rpartition(".")[0] if view.op == "call_module" else view.path
    return {"id": view.id, "label": label, "block": block, "inputs": view.inputs, "weights": view.weights}


def _masks(model: nn.Module) -> dict[str, Any]:
    updater = updater_of(model)
    if updater is None:
        return {}
    goals = updater.goals
    found = {n: thumbnail(mask, goals[n].out_dim if n in goals else None) for n, mask in updater.masks.items()}
    return {name: picture for name, picture in found.items() if picture}


def _history(model: nn.Module, report: FlopReport) -> dict[str, Any] | None:
    """Return densities, FLOPs and changes over the steps of a run; None before its first step."""
    updater = updater_of(model)
    if updater is None or not updater.step:
        return None
    topologies = updater.history
    steps, last = [entry.step for entry in topologies], updater.step > topologies[-1].step
    shown = [*steps, *[updater.step] * last]
    names = list(topologies[0].densities)
    densities = [{"label": n, "values": _upto([t.densities[n] for t in topologies], last)} for n in names]
    return {
        "steps": shown,
        "densities": densities,
        "inference_ratio": _upto([inference_ratio(updater, report, t.nonzeros) for t in topologies], last),
        "training_ratio": [None, *training_ratios(updater, report)][: len(shown)],  # nothing is spent at step 0
        "changes": _changes(model),
    }


def _upto(values: list[float], last: bool) -> list[float]:
    return [*values, values[-1]] if last else values


def _changes(model: nn.Module) -> dict[str, Any] | None:
    """Return how many weights updates dropped and grew, where the method's plan says it: not where updates were prevented."""
    updater = updater_of(model)
    assert updater is not None
    method, updates = updater.method, updater.method.updates
    if updates is None or updater.skipped_updates or not method.layout.exact:
        return None
    steps, dropped, grown = [], [], []
    for before, after in zip(updater.history, updater.history[1:], strict=False):
        amount = updates.amount(after.step, updater.total_steps)
        drop = grow = 0
        for name, count in before.nonzeros.items():
            goal = updater.goals[name]
            now = after.nonzeros[name]
            own = max(0, count - now) if method.prunes else steady_drop(count, goal.unit, amount)
            own = 0 if not method.prunes and goal.target == updater.masks[name].numel() else own
            drop, grow = drop + own, grow + now - count + own
        steps, dropped, grown = [*steps, after.step], [*dropped, drop], [*grown, grow]
    return {"steps": steps, "dropped": dropped, "grown": grown} if steps else None
