"""Verify: a captured model against the original, on the same inputs and random numbers (translation validation)."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from passes.capture.captured import install
from passes.capture.copies import copied
from passes.capture.effects import preserve_rng
from passes.capture.regions import Capture, trace

_SEED = 0
_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 1e-2, torch.complex64: 1e-5}


class VerificationError(ValueError):
    """A model cannot be compared with its graphs; the message says why."""


@dataclass(frozen=True)
class Run:
    """What one forward and backward pass leaves to be compared."""

    kind: type
    outputs: list[Any]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


def faithful_capture(model: nn.Module, blocks: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Capture:
    """Trace a model, and leave what does not compute what the model computes in Python.

    Both modes run, in training with gradients. Outputs, their types, gradients and buffers are compared. The model is not
    changed.

    Args:
        model: with real tensors.
        blocks: as for `trace`.
        args: positional arguments of forward, with values.
        kwargs: keyword arguments of forward.

    Returns:
        What `trace` returns. Regions that differed are in `opaque`, with what differed.

    Raises:
        VerificationError: the inputs have no values, the model fails on them, or two runs of the model itself differ.
    """
    inputs = (tuple(args), dict(kwargs))
    _check_values(model, inputs)
    expected = {mode: _reference(model, inputs, mode) for mode in (True, False)}
    python: dict[str, str] = {}
    while True:
        capture = trace(model, blocks, python)
        found = _first_difference(model, capture, inputs, expected)
        if found is None:
            return capture
        path, what = found
        python[path] = f"verification: as a graph, {what}"


def _check_values(model: nn.Module, inputs: Any) -> None:
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    if any(t.is_meta for t in [*tensors, *model.parameters(), *model.buffers()]):
        raise VerificationError(
            "Verification runs the model: give inputs with values, such as inputs=torch.rand(2, 3, 224, 224), and a model that "
            "is not on the meta device; or verify=False."
        )


def _reference(model: nn.Module, inputs: Any, training: bool) -> Run:
    """Run the original twice, to know that what is compared is decided by inputs and seed."""
    mode = _mode(training)
    try:
        first, second = (_run(copied(model), inputs, training) for _ in range(2))
    except Exception as error:
        raise VerificationError(
            f"Verification cannot run: the model itself fails on these inputs in {mode} mode: {type(error).__name__}: {error}"
        ) from error
    if what := _difference(first, second):
        raise VerificationError(
            f"Verification cannot run: two runs of the model itself differ, with the same seed in {mode} mode ({what}). Make "
            f"it deterministic, or use verify=False."
        )
    return first


def _mode(training: bool) -> str:
    return "training" if training else "evaluation"


def _first_difference(model: nn.Module, capture: Capture, inputs: Any, expected: Mapping[bool, Run]) -> tuple[str, str] | None:
    """Return the path of the first region that differs, and what differs; None where nothing does."""
    if not capture.regions or not _differs(model, capture, list(capture.regions), inputs, expected):
        return None
    for path in capture.regions:
        if what := _differs(model, capture, [path], inputs, expected):
            return path, what
    raise RuntimeError("The captured model differs from the original, and none of its regions alone does.")


def _differs(model: nn.Module, capture: Capture, paths: list[str], inputs: Any, expected: Mapping[bool, Run]) -> str:
    """Say how a copy of the model in which some regions run as graphs differs from the original, "" if it does not."""
    chosen = Capture({path: capture.regions[path] for path in paths}, {})
    for mode, reference in expected.items():
        candidate = install(copied(model), _with_own_graphs(chosen))
        try:
            what = _difference(reference, _run(candidate, inputs, mode))
        except Exception as error:
            what = f"it raises {type(error).__name__}: {error}"
        if what:
            return f"{what} (in {_mode(mode)} mode)"
    return ""


def _with_own_graphs(capture: Capture) -> Capture:
    """Copy the graphs: once installed, a graph belongs to one module."""
    regions = {}
    for path, region in capture.regions.items():
        copies = {graph: _copy_graph(graph) for graph in dict.fromkeys(region.graphs.values())}
        regions[path] = replace(region, graphs={mode: copies[graph] for mode, graph in region.graphs.items()})
    return Capture(regions, {})


def _copy_graph(graph: Any) -> Any:
    new = torch.fx.Graph(tracer_cls=graph._tracer_cls)
    output = new.graph_copy(graph, val_map={}, return_output_node=True)
    assert isinstance(output, tuple)
    new.output(output[0], type_expr=getattr(output[1], "type", None))
    new._codegen = graph._codegen
    return new


def _run(model: nn.Module, inputs: Any, training: bool) -> Run:
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), inputs)
    model.train(training)
    model.zero_grad()
    with _seeded(), torch.set_grad_enabled(training):
        result = model(*args, **kwargs)
        leaves = pytree.tree_leaves(dict(result) if isinstance(result, dict) else result)
        losses = [t.float().square().mean() for t in leaves if isinstance(t, Tensor) and t.requires_grad]
        if losses:
            torch.stack(losses).sum().backward()
    outputs = [t.detach() if isinstance(t, Tensor) else t for t in leaves]
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return Run(type(result), outputs, gradients, dict(model.named_buffers()))


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    with preserve_rng():
        torch.manual_seed(_SEED)
        yield


def _difference(a: Run, b: Run) -> str:
    """Say what differs, "" where nothing does."""
    if a.kind is not b.kind:
        return f"it returns {b.kind.__name__} instead of {a.kind.__name__}"
    if len(a.outputs) != len(b.outputs) or not all(map(_equal, a.outputs, b.outputs)):
        return "outputs differ"
    for name, gradient in a.gradients.items():
        if not _equal(gradient, b.gradients.get(name)):
            return f"the gradient of {name} differs"
    wrong = [name for name, buffer in a.buffers.items() if not _equal(buffer, b.buffers.get(name))]
    return f"buffer {wrong[0]} differs" if wrong else ""


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    tolerance = _TOLERANCE.get(a.dtype, 1e-5)
    scale = float(a.abs().max()) if a.numel() and (a.is_floating_point() or a.is_complex()) else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale * 0.1, equal_nan=True) if scale else torch.equal(a, b)
