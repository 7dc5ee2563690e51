"""Selection: which weights to drop and which to grow, as pure functions of tensors.

Nothing here asks the device for a number: counts come in as Python integers and results are masks of fixed shape.
"""

import numpy as np
import torch
from torch import Tensor

from passes.kernels.compiler import native, threads


def select(scores: Tensor, k: int, among: Tensor, lowest: bool = False) -> Tensor:
    """Mark the `k` elements of highest |score| among some positions; ties go to the lowest index.

    Args:
        scores: floating point, any shape, without NaN at allowed positions. The order of ties is that of `scores.flatten()`.
        k: how many, from 0 to the number of True elements of `among`.
        among: bool, the same shape: where to choose.
        lowest: whether to choose the lowest |score| instead.

    Returns:
        bool, the same shape, exactly `k` True elements, all inside `among`.

    Raises:
        ValueError: on the CPU, fewer than `k` elements are allowed.

    Example:
        >>> select(torch.tensor([-3.0, 1.0, 3.0, 3.0]), 2, torch.tensor([True, True, True, False]))
        tensor([ True, False,  True, False])
    """
    return _select(scores, k, among, True, lowest)


def _select(scores: Tensor, k: int, mask: Tensor, value: bool, lowest: bool = False) -> Tensor:
    """Select where a mask is `value`."""
    if k == 0:
        return torch.zeros_like(mask, memory_format=torch.contiguous_format)
    flat, flat_mask = (t.detach().contiguous().flatten() for t in (scores, mask))
    if scores.device.type != "cpu":
        chosen = _select_on_device(flat, k, flat_mask == value, lowest)
    elif scores.dtype is torch.float32 and (library := native()):
        found = np.empty(flat.shape, bool)  # numpy asks for large pages, where torch waits for one small page after the other
        given = flat.data_ptr(), flat_mask.data_ptr(), len(flat), k, value, lowest
        if not library.sparsify_select(*given, found.ctypes.data, threads()):
            raise ValueError(f"There are fewer than {k} elements to select from.")
        chosen = torch.from_numpy(found)
    else:
        chosen = _select_by_numpy(flat, k, flat_mask == value, lowest)
    return chosen.view(scores.shape)


def _select_on_device(scores: Tensor, k: int, among: Tensor, lowest: bool) -> Tensor:
    """Select with fixed shapes and no host synchronisation: every position above the k-th score, then the first ties."""
    scores = torch.where(among, -scores.abs() if lowest else scores.abs(), -torch.inf)  # (n,)
    threshold = scores.topk(k).values[-1]
    above, tied = scores > threshold, (scores == threshold) & among
    return above | (tied & (tied.cumsum(0) <= k - above.sum()))


def _select_by_numpy(scores: Tensor, k: int, among: Tensor, lowest: bool) -> Tensor:
    """Select as numpy partitions, which is several times as fast as torch's topk."""
    ranks, allowed = _ranks(scores, lowest), among.numpy()
    candidates = ranks[allowed]
    if k > candidates.size:
        raise ValueError(f"There are fewer than {k} elements to select from.")
    threshold = np.partition(candidates, -k)[-k]
    chosen = (ranks > threshold) & allowed
    tied = np.flatnonzero((ranks == threshold) & allowed)
    chosen[tied[: k - np.count_nonzero(chosen)]] = True
    return torch.from_numpy(chosen)


def _ranks(scores: Tensor, lowest: bool) -> np.ndarray:
    """Return numbers that are higher for what is chosen first."""
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
    kept = select(leaving, drop, mask, lowest=True).logical_xor_(mask)  # the mask without what is dropped
    return kept if coming is None or not grow else _select(coming, grow, kept, False).logical_xor_(kept)


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
