"""Layout: the shapes of a program's values, and how their planes lie in memory.

A plane is one channel of one image: rows of pixels, `pitch` numbers apart. Zeros around the pixels are the padding that readers
need, so that a convolution is a sum of shifted runs of numbers, whatever its kernel, and no case at the edges. All values that
one convolution goes along together have one pitch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from passes.lowering.program import SUMS, Op, Program
from passes.lowering.windows import Unsupported, window_of

SLACK = 16  # numbers after the last row that a vector may run over
SHARED = ("channels", "flatten", "permute", "adaptive_pool")  # operations whose results are planes of their inputs
_LAST = ("linear", "layer_norm", "attention")  # what takes channels to be the last dimension, and what the second
_FIRST = ("conv", "max_pool", "adaptive_pool", "mean", "channels", "flatten")


@dataclass(frozen=True)
class Shape:
    """The shape of one image of a value.

    Attributes:
        channels, rows, columns: of planes.
        last: whether channels come last in torch's tensor.
        rank: of torch's tensor.
    """

    channels: int
    rows: int
    columns: int
    last: bool
    rank: int

    @property
    def pixels(self) -> int:
        """The pixels of a plane."""
        return self.rows * self.columns

    def tensor(self, images: int) -> tuple[int, ...]:
        """Return the shape of torch's tensor."""
        if self.rank == 2:
            return (images * self.pixels, self.channels)
        images *= self.rows if self.rank == 3 else 1
        grid = (self.rows, self.columns) if self.rank == 4 else (self.columns,)
        return (images, *grid, self.channels) if self.last else (images, self.channels, *grid)

    def strides(self) -> dict[str, int]:
        """Return how far apart channels, rows and columns lie in torch's tensor."""
        if self.last or self.rank == 2:
            return {"channel_stride": 1, "row_stride": self.columns * self.channels, "column_stride": self.channels}
        return {"channel_stride": self.pixels, "row_stride": self.columns, "column_stride": 1}


def shapes_of(program: Program, inputs: Sequence[Sequence[int]]) -> tuple[list[Shape], int]:
    """Return the shapes of all values, and how many images there are.

    Args:
        program: what is computed.
        inputs: the shapes of its inputs.

    Raises:
        Unsupported: the kernels do not take these shapes.
    """
    if any(not s for shape in inputs for s in shape):
        raise Unsupported("an input is empty")
    pointwise = all(op.kind in ("linear", "activation", "add", "multiply", "layer_norm") for op in program.ops)
    ranks = {len(shape) for shape in inputs}
    # Samples without pixels of their own are the pixels of one image.
    flat = pointwise and (ranks == {2} or (ranks == {3} and all(program.inputs) and inputs[0][1] < 32))
    found = [_input_shape(tuple(shape), last, flat) for shape, last in zip(inputs, program.inputs, strict=True)]
    for op in program.ops:
        found.append(_out(op, [found[i] for i in op.inputs], flat))
        if op.kind in SUMS and any(found[i] != found[-1] for i in op.inputs[1:]):
            raise Unsupported("operands have different sizes")
    biases = {op.inputs[-1] for op in program.ops if (op.options or {}).get("biased")}  # one may be there for all images
    images = {1 if flat else shape[0] for i, shape in enumerate(inputs) if i not in biases or shape[0] != 1} or {1}
    if len(images) > 1:
        raise Unsupported("inputs have different batches")
    return found, images.pop()


def _input_shape(shape: tuple[int, ...], last: bool, flat: bool) -> Shape:
    rank = len(shape)
    if flat:
        rows, columns = (1, shape[0]) if rank == 2 else (shape[0], shape[1])
        return Shape(shape[-1], rows, columns, True, rank)
    if rank == 2:
        return Shape(shape[1], 1, 1, last, 2)
    grid = shape[1:-1] if last else shape[2:]
    return Shape(shape[-1] if last else shape[1], *_grid(grid), last, rank)


def _grid(grid: Sequence[int]) -> tuple[int, int]:
    return (1, grid[0]) if len(grid) == 1 else (grid[0], grid[1])


def _out(op: Op, inputs: list[Shape], flat: bool) -> Shape:
    x, window = inputs[0], window_of(op)
    if x.rank > 2 and x.last is not (op.kind in _LAST) and op.kind in (*_LAST, *_FIRST):
        raise Unsupported("operations disagree on which dimension holds channels")
    if window:
        return Shape(op.weight.shape[0] if op.weight else x.channels, *window.out(x.rows, x.columns), False, x.rank)
    if op.kind == "linear":
        assert op.weight
        return Shape(op.weight.shape[0], x.rows, x.columns, x.last, x.rank)
    if op.kind == "channels":
        pieces = (op.options or {})["pieces"]
        if any((i.rows, i.columns) != (x.rows, x.columns) for i in inputs):
            raise Unsupported("joined values have different sizes")
        return Shape(sum(stop - start for _, start, stop in pieces), x.rows, x.columns, False, x.rank)
    if op.kind == "attention":
        return _attention_out(inputs, (op.options or {})["heads"], (op.options or {})["biased"])
    if op.kind == "flatten":
        return Shape(x.channels * x.pixels, 1, 1, False, 2)
    if op.kind == "permute":
        return Shape(x.channels, x.rows, x.columns, not x.last, x.rank)
    if op.kind == "mean":
        return Shape(x.channels, 1, 1, False, x.rank if (op.options or {})["keepdim"] else 2)
    if op.kind == "adaptive_pool" and (op.options or {})["output_size"] != [x.rows, x.columns]:
        raise Unsupported("an adaptive pooling has windows of several sizes")
    if (
        len(inputs) > 1
        and inputs[1] != x
        and (op.kind != "multiply" or inputs[1].pixels > 1 or inputs[1].channels != x.channels)
    ):
        raise Unsupported("operands have different sizes")
    return x


def _attention_out(inputs: list[Shape], heads: int, biased: bool) -> Shape:
    x, parts = inputs[0], len(inputs) - biased
    if any(part != x for part in inputs[:parts]) or x.rank != 3:
        raise Unsupported("queries, keys and values have different sizes")
    if biased and not (
        inputs[-1].rows == x.columns and inputs[-1].columns in (1, x.columns) and inputs[-1].channels in (1, heads)
    ):
        raise Unsupported("a mask has other sizes than heads, keys and queries")
    return Shape(x.channels * parts // 3, x.rows, x.columns, x.last, x.rank)


@dataclass(frozen=True)
class Grid:
    """How the planes of a value lie in memory, in numbers.

    Attributes:
        pitch: from one row to the next.
        lead: before the first pixel.
        tail: after the last row.
        distance: from one plane to the next.
    """

    pitch: int
    lead: int
    tail: int
    distance: int


def framed(program: Program) -> set[int]:
    """Return which values are looked at around their pixels: inputs of padded convolutions, and what shares their planes."""
    found: set[int] = set()
    for number, op in reversed([*enumerate(program.ops, len(program.inputs))]):
        window = window_of(op)
        if op.kind == "conv" and window and window.direct and any(window.padding):
            found.add(op.inputs[0])
        if op.kind in SHARED and number in found:
            found.update(op.inputs)
    return found


def grids_of(program: Program, shapes: Sequence[Shape]) -> list[Grid]:
    """Return how every value lies."""
    parents = list(range(len(shapes)))

    def find(value: int) -> int:
        while parents[value] != value:
            value = parents[value]
        return value

    pads = [(0, 0)] * len(shapes)
    reach = [0] * len(shapes)
    for out, op in enumerate(program.ops, len(program.inputs)):
        window = window_of(op)
        if window and window.direct:
            pads[op.inputs[0]] = (
                max(pads[op.inputs[0]][0], window.padding[0]),
                max(pads[op.inputs[0]][1], window.padding[1]),
            )
        elif window:
            reach[out] = shapes[out].columns + window.reach()[1]
        shrunk = shapes[out].pixels == 1 < shapes[op.inputs[0]].pixels
        apart = op.kind in ("flatten", "mean") or shrunk or (window and not window.direct)
        together = [i for i in op.inputs[bool(apart) :] if (shapes[i].pixels == 1) == (shapes[out].pixels == 1)]
        for first, second in pairwise([out, *together]):
            parents[find(first)] = find(second)
    members: dict[int, list[int]] = {}
    for value in range(len(shapes)):
        members.setdefault(find(value), []).append(value)
    found: dict[int, Grid] = {}
    for values in members.values():
        rows, columns = (max(pads[v][side] for v in values) for side in (0, 1))
        pitch = max(max(shapes[v].columns + columns, reach[v]) for v in values)
        single = pitch == 1 and all(shapes[v].pixels == 1 for v in values) and not rows
        for value in values:
            found[value] = Grid(1, 0, 0, 1) if single else grid(shapes[value].rows, pitch, rows * pitch + columns)
    return [found[value] for value in range(len(shapes))]


def grid(rows: int, pitch: int, margin: int) -> Grid:
    """Return the grid of planes of so many rows: pixels start at cache lines, and planes spread over all of a cache's sets."""
    lead = -(-margin // 16) * 16
    lines = -(-(lead + rows * pitch + margin + SLACK) // 16) | 1
    return Grid(pitch, lead, lines * 16 - lead - rows * pitch, lines * 16)
