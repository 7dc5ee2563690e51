"""Selection: which weights to drop and which to grow, as pure functions of tensors.

Nothing here asks the device for a number: counts come in as Python integers and results are masks of fixed shape.
"""

import math

import numpy as np
import torch
from torch import Tensor

from passes.kernels.compiler import native

_SAMPLES = 8192  # enough to bracket a threshold within about 1% of a layer
_CHUNK = 1 << 18  # elements: what one chunk needs stays in the cache


def select(scores: Tensor, k: int, among: Tensor, lowest: bool = False) -> Tensor:
    """Mark the `k` elements of highest |score| among some positions; ties go to the lowest index.

    Args:
        scores: floating point, any shape, without NaN at allowed positions. The order of ties is that of `scores.flatten()`.
        k: how many, from 0 to the number of True elements of `among`.
        among: bool, the same shape: where to choose.
        lowest: whether to choose the lowest |score| instead.

    Returns:
        bool, the same shape, exactly `k` True elements, all inside `among`.

    Example:
        >>> select(torch.tensor([-3.0, 1.0, 3.0, 3.0]), 2, torch.tensor([True, True, True, False]))
        tensor([ True, False,  True, False])
    """
    if k == 0:
        return torch.zeros_like(among, memory_format=torch.contiguous_format)
    choose = _select_on_cpu if scores.device.type == "cpu" else _select_on_device
    return choose(scores.detach().flatten(), k, among.flatten(), lowest).view(scores.shape)


def _select_on_device(scores: Tensor, k: int, among: Tensor, lowest: bool = False) -> Tensor:
    """Select with fixed shapes and no host synchronisation: every position above the k-th score, then the first ties."""
    scores = torch.where(among, -scores.abs() if lowest else scores.abs(), -torch.inf)  # (n,)
    threshold = scores.topk(k).values[-1]
    above, tied = scores > threshold, (scores == threshold) & among
    return above | (tied & (tied.cumsum(0) <= k - above.sum()))


def _select_on_cpu(scores: Tensor, k: int, among: Tensor, lowest: bool = False) -> Tensor:
    """Select near memory speed: a sample brackets the k-th score, and only what lies in the bracket is partitioned."""
    low, high = _bracket(scores, lowest, k, among)
    chosen, positions, candidates = _split(scores, lowest, among, low, high)
    missing = k - np.count_nonzero(chosen)
    if not 0 < missing <= positions.size:  # the sample misled
        chosen, positions, candidates = _split(scores, lowest, among, -np.inf, np.inf)
        missing = k
    threshold = np.partition(candidates, -missing)[-missing]
    above = positions[candidates > threshold]
    tied = positions[candidates == threshold][: missing - above.size]
    chosen[above] = True
    chosen[tied] = True
    return torch.from_numpy(chosen)


def _split(scores: Tensor, lowest: bool, among: Tensor, low: float, high: float) -> tuple[np.ndarray, ...]:
    """Return where scores exceed `high`, and index and score of those from `low` to `high`: natively, or chunk by chunk."""
    chosen = np.empty(scores.shape, dtype=bool)
    if scores.dtype is torch.float32 and scores.is_contiguous() and among.is_contiguous() and (library := native()):
        room = np.empty(scores.shape, np.int64)  # of which little is touched
        places = (chosen.ctypes.data, room.ctypes.data)
        count = library.sparsify_split(scores.data_ptr(), among.data_ptr(), len(scores), lowest, low, high, *places)
        return chosen, room[:count], _ranks(torch.from_numpy(scores.numpy()[room[:count]]), lowest)
    positions, candidates = [], []
    for start in range(0, len(scores), _CHUNK):
        values, inside = _ranks(scores[start : start + _CHUNK], lowest), among[start : start + _CHUNK].numpy()
        above = np.logical_and(values > high, inside, out=chosen[start : start + _CHUNK])
        between = np.flatnonzero((inside & ~(values < low)) ^ above)  # NaN is between
        positions.append(between + start)
        candidates.append(values[between])
    return chosen, np.concatenate(positions), np.concatenate(candidates)


def _bracket(scores: Tensor, lowest: bool, k: int, among: Tensor) -> tuple[float, float]:
    """Return two scores between which the k-th highest of the allowed ones should lie."""
    if len(scores) < 2 * _SAMPLES:
        return -np.inf, np.inf
    stride = len(scores) // _SAMPLES
    while math.gcd(stride, len(scores)) > 1:  # else it could step through kernels always at the same place
        stride += 1
    sample = np.sort(_ranks(scores[::stride], lowest)[among[::stride].numpy()])
    expected = k / stride  # how many of the sample belong to the k highest
    margin = 4 * np.sqrt(expected) + 4
    low, high = sample.size - int(expected + margin), sample.size - int(expected - margin)
    return sample[low] if low >= 0 else -np.inf, sample[high] if high < sample.size else np.inf


def _ranks(scores: Tensor, lowest: bool) -> np.ndarray:
    """Return numbers that are higher for what is chosen first; all in numpy, since torch would start threads of its own."""
    if scores.dtype == torch.bfloat16:  # which numpy does not know: the upper half of a float32
        values = (scores.view(torch.int16).numpy().astype(np.int32) << 16).view(np.float32)
    else:
        values = scores.numpy().astype(np.float32) if scores.element_size() < 4 else scores.numpy()
    values = np.abs(values)
    return np.negative(values, out=values) if lowest else values


def drop_and_grow(leaving: Tensor, coming: Tensor | None, mask: Tensor, drop: int, grow: int) -> Tensor:
    """Drop the active weights of lowest |score|, then grow the candidates of highest |score| (RigL, Algorithm 1).

    Candidates are the inactive weights and those just dropped, so a dropped weight may come straight back.

    Args:
        leaving: scores that decide what is dropped (the weight itself for RigL), floating point, any shape.
        coming: scores that decide what is grown (the dense gradient for RigL), the same shape; None if `grow` is 0.
        mask: bool, the same shape.
        drop: how many, from 0 to the number of active weights.
        grow: how many, from 0 to the number of candidates.

    Returns:
        The new mask.

    Example:
        >>> weight, grad = torch.tensor([4.0, -1.0, 2.0, 0.0, 0.0]), torch.tensor([0.0, 0.1, 0.0, -3.0, 1.0])
        >>> drop_and_grow(weight, grad, weight != 0, 1, 1)
        tensor([ True, False,  True,  True, False])
    """
    kept = _unlike(select(leaving, drop, mask, lowest=True), mask)  # the mask without what is dropped
    if coming is None or not grow:
        return kept
    free = torch.from_numpy(~kept.numpy()) if kept.is_cpu else ~kept
    return _unlike(kept, select(coming, grow, free))


def _unlike(a: Tensor, b: Tensor) -> Tensor:
    """Return where two masks differ; on the CPU in this thread alone, as `select` works."""
    return torch.from_numpy(a.numpy() ^ b.numpy()) if a.is_cpu else a ^ b


def highest_of_rows(scores: Tensor, count: int | Tensor) -> Tensor:
    """Mask the `count` highest elements of every row; ties go to the lowest index.

    Args:
        scores: (rows, width), without NaN.
        count: at most `width`, or an integer tensor of no dimension.

    Returns:
        bool, (rows, width).

    Example:
        >>> highest_of_rows(torch.tensor([[1.0, 3.0, 3.0], [5.0, 0.0, 4.0]]), 1)
        tensor([[False,  True, False],
                [ True, False, False]])
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    first = (torch.arange(scores.shape[1], device=scores.device) < count).expand_as(order)
    return torch.zeros_like(first, memory_format=torch.contiguous_format).scatter_(1, order, first)
