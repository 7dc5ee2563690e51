"""Steps: what a native plan is made of, as `native/steps.h` has it, and running one."""

import ctypes
import enum
import mmap
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from passes.kernels.compiler import threads

ACTIVATIONS = ("none", "relu", "clamp", "sigmoid", "silu", "hardsigmoid", "hardswish", "gelu", "gelu_tanh", "tanh")
QUERIES = 4  # vectors of queries in a piece of an attention, at most
IMAGES = 8  # of a batch that take turns in a step, at most


class Kind(enum.IntEnum):
    """What a step does, in the order of the enum of the same name in C++."""

    READ = 0
    MOVE = 1
    WRITE = 2
    CONVOLVE = 3
    DOTS = 4
    POOL = 5
    ADD = 6
    MULTIPLY = 7
    ACTIVATE = 8
    MEAN = 9
    NORMALIZE = 10
    ATTEND = 11


_INTEGERS, _TABLE, _NUMBERS = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


class Step(ctypes.Structure):
    """One step; the fields, and what they mean, are those of `native/steps.h`."""

    _fields_ = (
        *((name, _INTEGERS) for name in ("kind", "items", "grain", "channels", "rows", "columns", "pitch")),
        *((name, _INTEGERS) for name in ("lead", "tail", "framed")),
        *((name, _TABLE) for name in ("target", "source", "other")),
        ("activation", _INTEGERS),
        *((name, _NUMBERS) for name in ("low", "high", "epsilon", "scaling")),
        *((name, _INTEGERS) for name in ("even", "outside", "image_stride", "channel_stride")),
        *((name, _INTEGERS) for name in ("row_stride", "column_stride")),
        ("boxes", _TABLE),
        *((name, _INTEGERS) for name in ("source_rows", "source_columns", "source_pitch")),
        ("window", _TABLE),
        *((name, _INTEGERS) for name in ("group", "blocks", "chunks")),
        *((name, _TABLE) for name in ("chunk_groups", "starts", "offsets", "values", "scale", "bias")),
        ("heads", _INTEGERS),
    )


class NativePlan:
    """Steps with their tables, ready to run; any number of threads may run it at once."""

    def __init__(self, library: ctypes.CDLL, steps: Sequence[dict[str, Any]], floats: int) -> None:
        """Make a plan.

        Args:
            library: what `passes.kernels.compiler.native` returned.
            steps: the fields of each; tables are numpy arrays of int32 or float32. Fields that are left out are 0.
            floats: how many numbers the activations of one image take.
        """
        split = _split(steps)
        self._tables, steps = _packed(steps)
        self.nbytes = len(self._tables)
        records = (Step * len(steps))()
        for record, step in zip(records, steps, strict=True):
            for name, value in step.items():
                setattr(record, name, value)
        self._library, self.count = library, len(steps)
        self._handle = ctypes.c_void_p(library.sparsify_plan(records, len(steps), floats, split))
        weakref.finalize(self, library.sparsify_forget, self._handle)

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], images: int) -> None:
        """Run the plan on contiguous float32 tensors, on as many threads as torch uses."""
        self._run(inputs, outputs, images, None)

    def seconds(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> np.ndarray:
        """Run the plan on the first image, and return how long every step took: (steps,) float64."""
        found = np.zeros(self.count)
        self._run(inputs, outputs, 1, found.ctypes.data)
        return found

    def _run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], images: int, seconds: int | None) -> None:
        sources = (ctypes.c_void_p * len(inputs))(*(x.data_ptr() for x in inputs))
        targets = (ctypes.c_void_p * len(outputs))(*(x.data_ptr() for x in outputs))
        if self._library.sparsify_run(self._handle, sources, targets, images, threads(), seconds):
            raise MemoryError(f"There is not enough memory for the activations of an image in {threads()} threads.")


def _split(steps: Sequence[dict[str, Any]]) -> int:
    """Return from which step on weights take more memory than the activations that are written."""
    excess = [_bytes(step.get("values")) - 4 * step["channels"] * step["rows"] * step["columns"] for step in steps]
    after = np.cumsum([0, *excess[::-1]])[::-1]
    return int(after.argmax())


def _bytes(values: np.ndarray | None) -> int:
    return 0 if values is None else values.nbytes + 4 * len(values)


def _packed(steps: Sequence[dict[str, Any]]) -> tuple[mmap.mmap, list[dict[str, Any]]]:
    """Copy all tables behind each other, on large pages where the system has them; tables become where they are."""
    tables = {id(value): value for step in steps for value in step.values() if isinstance(value, np.ndarray)}
    assert all(table.flags.c_contiguous and table.dtype in (np.int32, np.float32) for table in tables.values())
    starts = np.cumsum([0, *(-(-table.nbytes // 64) * 64 for table in tables.values())])
    memory = mmap.mmap(-1, max(1, int(starts[-1])))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    address = {}
    for (key, table), start in zip(tables.items(), starts, strict=False):
        whole[start : start + table.nbytes] = table.reshape(-1).view(np.uint8)
        address[key] = whole.ctypes.data + int(start)
    return memory, [{k: address[id(v)] if isinstance(v, np.ndarray) else v for k, v in step.items()} for step in steps]
