"""Plan: a program on inputs of given shapes as steps of the native library."""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from passes.kernels.compiler import threads
from passes.kernels.costs import CALL, COPIED, Machine, choose, torch_cycles
from passes.kernels.order import order_of
from passes.kernels.steps import IMAGES, QUERIES, Kind, NativePlan
from passes.lowering.arrange import mask_of, patterns_of
from passes.lowering.emit import Emitter
from passes.lowering.layout import SHARED, framed, grids_of, shapes_of
from passes.lowering.memory import Planes
from passes.lowering.program import SUMS, Op, Program
from passes.lowering.windows import Unsupported, Window, window_of

_KINDS = {"max_pool": Kind.POOL, "layer_norm": Kind.NORMALIZE, "add": Kind.ADD, "multiply": Kind.MULTIPLY, "mean": Kind.MEAN}
_KINDS |= {"activation": Kind.ACTIVATE, "attention": Kind.ATTEND}
_SLACK = 4096  # numbers after the last plane that vectors may read
_PIXEL = Window((1, 1), (1, 1), (0, 0), (1, 1))


@dataclass(frozen=True)
class Choice:
    """What runs a layer.

    Attributes:
        name: of its node in the graph.
        kind: "conv" or "linear".
        density: the share of its weights that is kept.
        kernel: "sparse": every output by itself; "shared": two or four outputs multiply what any of them keeps, for layers that
            are nearly dense or share patterns; "dots": for a single pixel.
        cycles: about how many it takes on one core.
        dense_cycles: about how many torch takes for the dense layer.
    """

    name: str
    kind: str
    density: float
    kernel: str
    cycles: float
    dense_cycles: float


@dataclass(frozen=True)
class Plan:
    """A program, ready for inputs of given shapes.

    Attributes:
        native: its steps.
        shapes: of the outputs.
        images: how many images the inputs hold.
        choices: what runs each layer.
        names: for each step, the node whose result it computes; "" where it only brings numbers elsewhere.
        cycles, torch_cycles: about how many the plan takes on one core, and torch for the same, dense.
    """

    native: NativePlan
    shapes: tuple[tuple[int, ...], ...]
    images: int
    choices: tuple[Choice, ...]
    names: tuple[str, ...]
    cycles: float
    torch_cycles: float


def plan(
    program: Program, inputs: Sequence[Sequence[int]], values: Tensor, bits: Tensor, library: ctypes.CDLL, machine: Machine
) -> Plan:
    """Return the plan of a program on inputs of these shapes.

    Args:
        program: what to compute.
        inputs: the shapes of its inputs.
        values, bits: its numbers.
        library: the native one.
        machine: what it runs on.

    Raises:
        Unsupported: the kernels do not take these shapes.
    """
    shapes, images = shapes_of(program, inputs)
    emitter = Emitter(shapes, grids_of(program, shapes), framed(program))
    planner = _Planner(program, emitter, values.numpy(), bits.numpy(), library, machine, min(images, IMAGES))
    for i, shape in enumerate(inputs):
        emitter.read(i, same=shape[0] == 1 < images)
    for number, op in enumerate(program.ops, len(program.inputs)):
        planner.add(number, op)
    for i, value in enumerate(program.outputs):
        emitter.write(i, value)
    steps, floats = emitter.steps()
    if max(floats + _SLACK, *(math.prod(shape[1:]) for shape in inputs)) >= 2**31:
        raise Unsupported("the activations of one image are too many")
    other, choices = COPIED * emitter.copied, tuple(planner.choices)
    return Plan(
        native=NativePlan(library, steps, floats + _SLACK),
        shapes=tuple(shapes[value].tensor(images) for value in program.outputs),
        images=images,
        choices=choices,
        names=tuple(emitter.names),
        cycles=CALL + images * (other + sum(choice.cycles for choice in choices)),
        torch_cycles=images * (other / 2 + sum(choice.dense_cycles for choice in choices)),
    )


class _Planner:
    """Adds the steps of operations."""

    def __init__(
        self,
        program: Program,
        emitter: Emitter,
        values: np.ndarray,
        bits: np.ndarray,
        library: ctypes.CDLL,
        machine: Machine,
        images: int,
    ) -> None:
        self._emitter, self._values, self._bits, self._library, self._machine = emitter, values, bits, library, machine
        self._images = images  # that take turns in a step
        self._last_use = _last_uses(program)
        self.choices: list[Choice] = []

    def add(self, number: int, op: Op) -> None:
        """Add the steps of an operation whose result is the value of this number."""
        planes = self._emitter.planes
        if op.kind in SHARED:
            planes.append(self._shared(op))
        else:
            planes.append(self._overwritten(number, op) or self._emitter.new(number))
            self._convolve(number, op) if op.kind in SUMS else self._compute(number, op)

    def _shared(self, op: Op) -> Planes:
        """Return the result of an operation that only says which planes are meant."""
        first = self._emitter.planes[op.inputs[0]]
        if op.kind == "channels":
            pieces = (op.options or {})["pieces"]
            return Planes.joined([self._emitter.planes[op.inputs[i]].part(start, stop) for i, start, stop in pieces])
        if op.kind != "flatten":
            return first
        shape, pitch = self._emitter.shapes[op.inputs[0]], self._emitter.grids[op.inputs[0]].pitch
        places = (np.arange(shape.rows)[:, None] * pitch + np.arange(shape.columns)).reshape(-1)
        return first.repeated(shape.pixels).shifted(np.tile(places, shape.channels))

    def _overwritten(self, number: int, op: Op) -> Planes | None:
        """Return the planes of an operand that lies as the result does and that nothing reads any more."""
        emitter = self._emitter
        # Of what a layer sums up, other outputs need every pixel; what is added to a sum is read where the sum is written.
        candidates = [x for x in op.inputs[1:] if x != op.inputs[0]] if op.kind in SUMS else op.inputs
        for x in candidates if op.kind in (*SUMS, "add", "multiply", "activation") else ():
            alike = emitter.shapes[x] == emitter.shapes[number] and emitter.grids[x] == emitter.grids[number]
            if alike and len(emitter.planes[x].buffers) == 1 and self._last_use[x] == number:
                return emitter.planes[x]
        return None

    def _compute(self, number: int, op: Op) -> None:
        emitter, x = self._emitter, op.inputs[0]
        of, shape, lying, window = emitter.shapes[x], emitter.shapes[number], emitter.grids[number], window_of(op)
        fields = {"source": emitter.planes[x], "source_pitch": emitter.grids[x].pitch}
        fields |= {"source_rows": of.rows, "source_columns": of.columns}
        if op.kind == "max_pool" and window:
            sizes = (window.kernel, window.stride, window.padding, window.dilation)
            fields["window"] = np.array([[size[side] for size in sizes] for side in (0, 1)], np.int32)
        elif op.kind == "layer_norm":
            assert op.weight
            vectors = -(-((shape.rows - 1) * lying.pitch + shape.columns) // self._machine.lanes)
            grain = -(-vectors // (4 * threads()))
            fields |= {"scale": self._values[op.weight.start :][: op.weight.count].copy(), "bias": self._bias(op)}
            fields |= {"epsilon": (op.options or {})["eps"], "grain": grain, "items": -(-vectors // grain)}
        elif op.kind == "attention":
            fields |= self._attention(op, -(-shape.pixels // self._machine.lanes))
        elif op.kind in ("add", "multiply"):
            fields |= {"other": emitter.planes[op.inputs[1]], "even": int(emitter.shapes[op.inputs[1]].pixels == 1)}
        emitter.compute(_KINDS[op.kind], number, fields, op)

    def _attention(self, op: Op, vectors: int) -> dict[str, Any]:
        emitter, options, parts = self._emitter, op.options or {}, list(op.inputs)
        fields: dict[str, Any] = {"heads": (heads := options["heads"]), "scaling": options["scale"]}
        if options["biased"]:
            bias, lying = emitter.shapes[op.inputs[-1]], emitter.grids[op.inputs[-1]]
            fields |= {"other": emitter.planes[parts.pop()], "even": int(bias.channels == 1)}
            fields |= {"source_pitch": lying.pitch, "source_columns": bias.columns}
        return fields | {"source": Planes.joined([emitter.planes[i] for i in parts]), "items": heads * -(-vectors // QUERIES)}

    def _bias(self, op: Op) -> np.ndarray:
        assert op.weight
        count = op.weight.shape[0]
        return np.zeros(count, np.float32) if op.bias is None else self._values[op.bias : op.bias + count].copy()

    def _convolve(self, number: int, op: Op) -> None:
        emitter, weight, x = self._emitter, op.weight, op.inputs[0]
        shape, lying, window = emitter.shapes[number], emitter.grids[number], window_of(op) or _PIXEL
        assert weight
        source, at = emitter.planes[x], emitter.grids[x]
        if not window.direct:
            source, at = emitter.move(x, window, shape.rows, shape.columns, lying.pitch)
        phases = 1 if window.direct else len(window.phases(0)) * len(window.phases(1))
        if math.prod(weight.shape) >= 2**31:
            raise Unsupported("a weight has 2**31 elements or more")
        mask, groups = mask_of(weight, self._bits), (op.options or {}).get("groups", 1)
        flat = (shape.rows - 1) * lying.pitch + shape.columns
        single = lying.distance == 1  # planes are one pixel
        work = choose(
            self._machine, mask, weight.shape, window.heights(), flat, lying.pitch, groups, self._images, single=single
        )
        dense = torch_cycles(self._machine, mask.size, shape.pixels, groups, shape.channels * shape.pixels)
        kernel = "dots" if single else "sparse" if work.group == 1 else "shared"
        self.choices.append(Choice(op.name, op.kind, float(mask.mean()), kernel, work.cycles, dense))
        patterns, kept = patterns_of(weight, self._values, mask, work.group, groups)
        # Where the pixels lie that a weight multiplies: which plane, and from where in it.
        phase, place = zip(*window.places(at.pitch), strict=True)
        order = order_of(
            self._library,
            patterns,
            phase,
            phases,
            channels=work.channels,
            chunk_weights=work.chunk_weights,
            chunks=work.chunks,
        )
        planes, values, shifts = order.offsets, np.empty_like(kept), np.empty_like(order.offsets)
        values[order.place] = kept
        shifts[order.place] = np.array(place)[patterns.places % len(place)]
        vectors, chunks = -(-flat // self._machine.lanes), len(order.chunk_groups) - 1
        fields = {"group": work.group, "blocks": order.blocks, "chunks": chunks, "grain": work.vectors}
        fields |= {"items": chunks * (1 if single else -(-vectors // work.vectors)), "bias": self._bias(op)}
        fields |= {"chunk_groups": order.chunk_groups, "starts": order.starts, "values": values}
        fields |= {"offsets": lambda: (source.offsets()[planes] + shifts).astype(np.int32)}
        fields |= {"other": emitter.planes[op.inputs[1]]} if len(op.inputs) > 1 else {}
        emitter.memory.use(source)
        emitter.compute(Kind.DOTS if single else Kind.CONVOLVE, number, fields, op)


def _last_uses(program: Program) -> dict[int, int | None]:
    """Return the operation that reads each value last; None where others share its planes or it is a result."""
    found: dict[int, int | None] = {}
    for number, op in enumerate(program.ops, len(program.inputs)):
        for x in op.inputs:
            found[x] = None if op.kind in SHARED or (x in found and found[x] is None) else number
    for number, op in enumerate(program.ops, len(program.inputs)):
        if op.kind in SHARED:
            found[number] = None
    return found | dict.fromkeys(program.outputs)
