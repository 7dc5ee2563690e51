"""Cache: the sums of a layer, prepared once for a mask until something writes to it."""

import ctypes
import functools
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from passes.kernels.compiler import native, threads
from passes.kernels.costs import Machine, this_machine
from passes.kernels.parts import forward_sum, input_sum
from passes.kernels.sums import Prepared
from passes.kernels.values import is_compressed
from passes.kernels.windows import Kept, Lying, Window, with_pixels

_SHAPES = 4  # of inputs, whose sums are kept for a mask
_TABLES = 8  # of weights, of each kind of sum


@dataclass
class _Sums:
    """What was prepared for a mask, as it was at a version."""

    version: int
    kept: dict[Any, Any]  # by groups and how the weight is stored
    found: dict[Any, Prepared]  # by what is computed and on which shapes
    tables: dict[Any, dict[Any, Any]]  # that sums on other shapes may share, by what is computed


_PREPARED: Any = WeakTensorKeyDictionary()
_LOCK = threading.Lock()


@functools.cache
def _machine(library: ctypes.CDLL) -> Machine:
    return this_machine(library)


@torch.compiler.assume_constant_result
def lanes() -> int:
    """Return how many numbers the native loops compute with at once; 0 where there are none."""
    library = native()
    return _machine(library).lanes if library else 0


_MAKERS: dict[str, Any] = {
    "output": forward_sum,
    "input": input_sum,
    "weight": functools.partial(forward_sum, gradient=True),
}


def prepared(of: str, library: ctypes.CDLL, weight: Tensor, mask: Tensor, window: Window, x: Tensor, y: Tensor) -> Prepared:
    """Return the sums of a layer, made once for a mask and the shapes of input and output, until the mask is written to.

    Args:
        of: "output", or the gradient of the "input" or of the "weight".
        library: the native one.
        weight, mask: the dense weight or its kept values alone, and what is kept of it.
        window: what it looks at.
        x, y: input and output.
    """
    key = (of, window, *((t.shape, t.stride()) for t in (weight, x, y)), threads())
    version = 0 if mask.is_inference() else mask._version
    with _LOCK:
        sums = _PREPARED.get(mask)
        if sums is None or sums.version != version:
            sums = _PREPARED[mask] = _Sums(version, {}, {}, {})
        if key not in sums.found:
            found = _prepare(of, library, weight, mask, window, x, y, sums)
            if len(sums.found) >= 3 * _SHAPES:
                sums.found.pop(next(iter(sums.found)))
            sums.found[key] = found
        return sums.found[key]


def _prepare(
    of: str, library: ctypes.CDLL, weight: Tensor, mask: Tensor, window: Window, x: Tensor, y: Tensor, sums: _Sums
) -> Prepared:
    last, alone = format_of(as_images(weight)) == torch.channels_last, is_compressed(weight, mask)
    if (window.groups, last, alone) not in sums.kept:
        found = Kept.of(mask.numpy(), window.groups, last)
        sums.kept[window.groups, last, alone] = found.alone() if alone else found
    kept = sums.kept[window.groups, last, alone]
    if weight.numel() != kept.elements:
        raise ValueError(f"A weight of {tuple(weight.shape)} is neither whole nor the kept values of its mask.")
    tables = sums.tables.setdefault((of, window, last, alone), {})
    if len(tables) > _TABLES:
        tables.clear()
    return _MAKERS[of](library, kept, window, Lying.of(x), Lying.of(y), _machine(library), tables)


def format_of(x: Tensor) -> torch.memory_format:
    """Return whether channels lie last, where that is not the same as contiguous."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def as_images(weight: Tensor) -> Tensor:
    """Return a weight, or its mask, with rows and columns."""
    return weight if weight.dim() == 4 else weight.reshape(with_pixels(weight.shape))
