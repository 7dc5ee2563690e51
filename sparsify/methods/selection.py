"""Selection: which weights to drop and which to grow, as pure functions of tensors.

Nothing here asks the device for a number: counts come in as Python integers and results are masks of fixed shape.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Elementwise = Callable[[Tensor], Tensor]

_SAMPLES = 8192  # enough to bracket a threshold within about 1% of a layer
_CHUNK = 1 << 15  # elements: what one chunk needs stays in the cache, and torch starts no threads of its own for it


def select(tensor: Tensor, score: Elementwise, k: int, among: Tensor) -> Tensor:
    """Mark the `k` elements of highest score among some positions; ties go to the lowest index.

    Args:
        tensor: floating point, any shape. The order of ties is that of `tensor.flatten()`.
        score: elementwise function; higher is chosen first. Results at allowed positions must not be NaN.
        k: how many, from 0 to the number of True elements of `among`.
        among: bool, the same shape: where to choose.

    Returns:
        bool, the same shape, exactly `k` True elements, all inside `among`.

    Example:
        >>> select(torch.tensor([-3.0, 1.0, 3.0, 3.0]), torch.abs, 2, torch.tensor([True, True, True, False]))
        tensor([ True, False,  True, False])
    """
    if k == 0:
        return torch.zeros_like(among, memory_format=torch.contiguous_format)
    choose = _select_on_cpu if tensor.device.type == "cpu" else _select_on_device
    return choose(tensor.flatten(), score, k, among.flatten()).view(tensor.shape)


def _select_on_device(tensor: Tensor, score: Elementwise, k: int, among: Tensor) -> Tensor:
    """Select with fixed shapes and no host synchronisation: every position above the k-th score, then the first ties."""
    scores = torch.where(among, score(tensor), -torch.inf)  # (n,)
    threshold = scores.topk(k).values[-1]
    above, tied = scores > threshold, (scores == threshold) & among
    return above | (tied & (tied.cumsum(0) <= k - above.sum()))


def _select_on_cpu(tensor: Tensor, score: Elementwise, k: int, among: Tensor) -> Tensor:
    """Select near memory speed: a sample brackets the k-th score, and only what lies in the bracket is partitioned."""
    low, high = _bracket(tensor, score, k, among)
    chosen, positions, candidates = _split(tensor, score, among, low, high)
    missing = k - np.count_nonzero(chosen)
    if not 0 < missing <= positions.size:  # the sample misled
        chosen, positions, candidates = _split(tensor, score, among, -np.inf, np.inf)
        missing = k
    threshold = np.partition(candidates, -missing)[-missing]
    above = positions[candidates > threshold]
    tied = positions[candidates == threshold][: missing - above.size]
    chosen[above] = True
    chosen[tied] = True
    return torch.from_numpy(chosen)


def _split(tensor: Tensor, score: Elementwise, among: Tensor, low: float, high: float) -> tuple[np.ndarray, ...]:
    """Score chunk by chunk; return where scores exceed `high`, and index and score of those from `low` to `high`."""
    chosen = np.empty(tensor.shape, dtype=bool)
    positions, candidates = [], []
    for start, chunk, allowed in zip(range(0, len(tensor), _CHUNK), tensor.split(_CHUNK), among.split(_CHUNK), strict=True):
        values, inside = _scores(chunk, score), allowed.numpy()
        above = np.logical_and(values > high, inside, out=chosen[start : start + _CHUNK])
        between = np.flatnonzero((inside & ~(values < low)) ^ above)  # NaN is between
        positions.append(between + start)
        candidates.append(values[between])
    return chosen, np.concatenate(positions), np.concatenate(candidates)


def _bracket(tensor: Tensor, score: Elementwise, k: int, among: Tensor) -> tuple[float, float]:
    """Return two scores between which the k-th highest of the allowed ones should lie."""
    if len(tensor) < 2 * _SAMPLES:
        return -np.inf, np.inf
    stride = len(tensor) // _SAMPLES
    while math.gcd(stride, len(tensor)) > 1:  # else it could step through kernels always at the same place
        stride += 1
    sample = np.sort(_scores(tensor[::stride], score)[among[::stride].numpy()])
    expected = k / stride  # how many of the sample belong to the k highest
    margin = 4 * np.sqrt(expected) + 4
    low, high = sample.size - int(expected + margin), sample.size - int(expected - margin)
    return sample[low] if low >= 0 else -np.inf, sample[high] if high < sample.size else np.inf


def _scores(tensor: Tensor, score: Elementwise) -> np.ndarray:
    scores = score(tensor)
    return (scores.float() if scores.element_size() < 4 else scores).numpy()  # numpy knows no bfloat16


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
    kept = _unlike(select(leaving, lowest, drop, among=mask), mask)  # the mask without what is dropped
    if coming is None or not grow:
        return kept
    free = torch.from_numpy(~kept.numpy()) if kept.is_cpu else ~kept
    return _unlike(kept, select(coming, torch.abs, grow, among=free))


def _unlike(a: Tensor, b: Tensor) -> Tensor:
    """Return where two masks differ; on the CPU in this thread alone, as `select` works."""
    return torch.from_numpy(a.numpy() ^ b.numpy()) if a.is_cpu else a ^ b


def lowest(tensor: Tensor) -> Tensor:
    """Score the elements of smallest absolute value highest."""
    return -tensor.abs()


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
