"""Timing: what every layer of a lowered model takes, in the kernels and in torch."""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from passes.lowering.interpret import dense, run_op
from passes.lowering.plan import Choice, Plan
from passes.lowering.program import Program
from passes.lowering.run import prepared
from passes.lowering.segment import Segment


@dataclass(frozen=True)
class LayerTime:
    """A layer that the kernels run.

    Attributes:
        choice: which kernel, and what was predicted.
        seconds: for one image, with what is fused into it and what is moved for it.
        torch_seconds: of torch for the same, dense, on all images, divided by their number.
    """

    choice: Choice
    seconds: float
    torch_seconds: float


@torch.no_grad()
def layer_times(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], repeats: int) -> list[LayerTime]:
    """Time every layer that the kernels run in a lowered model.

    Args:
        model: what `lower_` returned.
        args, kwargs: to call it with.
        repeats: how often everything is run; the medians count.
    """
    found: list[LayerTime] = []
    inputs: dict[Segment, tuple[Tensor, ...]] = {}
    segments = [module for module in model.modules() if isinstance(module, Segment)]

    def remember(module: Any, given: tuple[Tensor, ...]) -> None:
        inputs.setdefault(module, given)

    handles = [segment.register_forward_pre_hook(remember) for segment in segments]
    model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    for segment, given in inputs.items():
        plan = prepared(given, segment.values, segment.bits, segment.program)
        if isinstance(plan, Plan):
            found += _segment_times(segment, plan, [x.contiguous() for x in given], repeats)
    return found


def _segment_times(segment: Segment, plan: Plan, inputs: list[Tensor], repeats: int) -> list[LayerTime]:
    program = Program.from_json(segment.program)
    weights = [dense(op.weight, segment.values, segment.bits) if op.weight else None for op in program.ops]
    outputs = [torch.empty(shape) for shape in plan.shapes]
    ours, theirs = [], []
    for _ in range(repeats + 1):  # the first one warms up
        ours.append(plan.native.seconds(inputs, outputs))
        values, taken = list(inputs), []
        for op, weight in zip(program.ops, weights, strict=True):
            begin = time.perf_counter()
            values.append(run_op(op, values, weight, segment.values))
            taken.append(time.perf_counter() - begin)
        theirs.append(taken)
    by_name: dict[str, float] = defaultdict(float)
    waiting = 0.0
    for name, seconds in zip(plan.names, np.median(ours[1:], 0), strict=True):
        waiting += float(seconds)
        if name:  # what was moved before was moved for it
            by_name[name] += waiting
            waiting = 0.0
    dense_seconds = dict(zip((op.name for op in program.ops), np.median(theirs[1:], 0) / plan.images, strict=True))
    return [LayerTime(c, by_name[c.name], float(dense_seconds[c.name])) for c in plan.choices]
