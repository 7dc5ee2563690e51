"""Windows: what convolutions and poolings look at."""

from collections.abc import Sequence
from dataclasses import dataclass

from passes.lowering.program import Op

MARGIN = 3  # the most padding that stands around planes; for more, and for strides, planes are copied


class Unsupported(Exception):  # noqa: N818 - an answer
    """The kernels do not take a program on these shapes; torch's operations do."""


@dataclass(frozen=True)
class Window:
    """What a convolution or a pooling looks at: of rows, and of columns."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil: bool = False

    @property
    def direct(self) -> bool:
        """Whether planes are read where they are."""
        return self.stride == (1, 1) and max(self.padding) <= MARGIN

    def out(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the rows and columns that come out."""
        found = []
        for size, left, s, p in zip((rows, columns), self._left(rows, columns), self.stride, self.padding, strict=True):
            count = left // s + 1
            # One more that reaches over the end, if it begins before the end.
            found.append(count + 1 if self.ceil and left % s and count * s < size + p else count)
        if min(found) < 1:
            raise Unsupported("the input is smaller than a window")
        return found[0], found[1]

    def _left(self, rows: int, columns: int) -> list[int]:
        around = zip((rows, columns), self.kernel, self.padding, self.dilation, strict=True)
        return [size + 2 * p - d * (k - 1) - 1 for size, k, p, d in around]

    def phases(self, side: int) -> list[int]:
        """Return the phases of the stride of rows (0) or columns (1) at which something is looked at."""
        return sorted({self.dilation[side] * k % self.stride[side] for k in range(self.kernel[side])})

    def heights(self) -> list[int]:
        """Return for every plane of a channel how many of its rows a row of outputs looks at."""
        if self.direct:
            return [self.kernel[0]]
        rows = [self.dilation[0] * k % self.stride[0] for k in range(self.kernel[0])]
        return [rows.count(phase) for phase in self.phases(0) for _ in self.phases(1)]

    def places(self, pitch: int) -> list[tuple[int, int]]:
        """Return for every pixel of the kernel the plane where it is, and where it is from pixel (0, 0) of that plane.

        Args:
            pitch: from one row of these planes to the next.
        """
        rows, columns = self.phases(0), self.phases(1)
        found = []
        for ky in range(self.kernel[0]):
            for kx in range(self.kernel[1]):
                y, x = ky * self.dilation[0], kx * self.dilation[1]
                if self.direct:
                    found.append((0, (y - self.padding[0]) * pitch + x - self.padding[1]))
                    continue
                phase = rows.index(y % self.stride[0]) * len(columns) + columns.index(x % self.stride[1])
                found.append((phase, y // self.stride[0] * pitch + x // self.stride[1]))
        return found

    def reach(self) -> tuple[int, int]:
        """Return how many rows and columns further than the outputs the copied planes reach."""
        rows, columns = (d * (k - 1) // s for k, s, d in zip(self.kernel, self.stride, self.dilation, strict=True))
        return rows, columns


def window_of(op: Op) -> Window | None:
    """Return what an operation looks at, None where it looks at single pixels."""
    options = op.options or {}
    if op.kind == "conv":
        assert op.weight
        around = ((op.weight.shape[2:], 1), (options["stride"], 1), (options["padding"], 0), (options["dilation"], 1))
        kernel, stride, padding, dilation = (_two(values, one) for values, one in around)
        return Window(kernel, stride, padding, dilation)
    if op.kind == "max_pool":
        kernel, stride, padding, dilation = (
            _two(options[name], 1) for name in ("kernel_size", "stride", "padding", "dilation")
        )
        return Window(kernel, stride, padding, dilation, options["ceil_mode"])
    return None


def _two(values: Sequence[int], one: int) -> tuple[int, int]:
    """Return the numbers of rows and columns; an image of one dimension has one row."""
    return (values[0], values[1]) if len(values) == 2 else (one, values[0])
