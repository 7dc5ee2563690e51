"""Topology: which weights to drop and which to grow, as pure functions of tensors.

Nothing here asks the device for a number: counts come in as Python integers and results are masks of fixed shape.
"""

import numpy as np
import torch
from torch import Tensor

_SAMPLES = 4096  # enough to place a threshold within a few percent
_SMALL = 1 << 15  # below this many scores, partitioning them all is as fast


def select(scores: Tensor, k: int, among: Tensor) -> Tensor:
    """Mark the `k` highest scores among some positions; ties go to the lowest index.

    Args:
        scores: floating point, any shape; higher is chosen first. The order of ties is that of `scores.flatten()`.
        k: how many, from 0 to the number of True elements of `among`.
        among: bool, the same shape: where to choose.

    Returns:
        bool, the same shape, exactly `k` True elements, all inside `among`.

    Example:
        >>> select(torch.tensor([3.0, 1.0, 3.0, 3.0]), 2, torch.tensor([True, True, True, False]))
        tensor([ True, False,  True, False])
    """
    if k == 0:
        return torch.zeros_like(among, memory_format=torch.contiguous_format)
    choose = _select_on_cpu if scores.device.type == "cpu" else _select_on_device
    return choose(scores.flatten(), k, among.flatten()).view(scores.shape)


def _select_on_device(scores: Tensor, k: int, among: Tensor) -> Tensor:
    """Select with fixed shapes and no host synchronisation: every position above the k-th score, then the first ties."""
    scores = torch.where(among, scores, -torch.inf)  # (n,)
    threshold = scores.topk(k).values[-1]
    above, tied = scores > threshold, (scores == threshold) & among
    return above | (tied & (tied.cumsum(0) <= k - above.sum()))


def _select_on_cpu(scores: Tensor, k: int, among: Tensor) -> Tensor:
    """Select by partitioning only what lies above a sampled threshold: near memory speed on large layers."""
    values = scores.float().numpy() if scores.element_size() < 4 else scores.numpy()  # numpy knows no bfloat16
    allowed = among.numpy()
    positions = np.flatnonzero(allowed & (values >= _sampled_threshold(values, k, allowed)))
    if positions.size < k:  # the sample misled
        positions = np.flatnonzero(allowed)
    candidates = values[positions]
    cut = candidates.size - k
    threshold = candidates[np.argpartition(candidates, cut)[cut]]
    above = positions[candidates > threshold]
    tied = positions[candidates == threshold][: k - above.size]
    chosen = np.zeros(values.shape, dtype=bool)
    chosen[above] = True
    chosen[tied] = True
    return torch.from_numpy(chosen)


def _sampled_threshold(values: np.ndarray, k: int, allowed: np.ndarray) -> float:
    """Return a score that somewhat more than `k` of the allowed ones should reach."""
    if values.size < _SMALL:
        return -np.inf
    stride = values.size // _SAMPLES | 1  # odd, so as not to walk along a power-of-two dimension
    sample = np.sort(values[::stride][allowed[::stride]])
    expected = k / stride  # how many of the sample belong to the k highest
    margin = 4 * np.sqrt(expected) + 4
    rank = int(expected + margin)
    return sample[-rank] if rank <= sample.size else -np.inf


def drop_and_grow(keep: Tensor, growth: Tensor, mask: Tensor, k: int) -> Tensor:
    """Drop the `k` active weights of lowest score, then grow the `k` candidates of highest score (RigL, Algorithm 1).

    Candidates are the inactive weights and those just dropped, so a dropped weight may come straight back.

    Args:
        keep: score of staying active (|w| for RigL), floating point, any shape.
        growth: score of becoming active (|dense gradient| for RigL), the same shape.
        mask: bool, the same shape.
        k: how many, from 0 to the number of active weights.

    Returns:
        The new mask, with as many True elements as the old one.

    Example:
        >>> weight, grad = torch.tensor([4.0, -1.0, 2.0, 0.0, 0.0]), torch.tensor([0.0, 0.1, 0.0, -3.0, 1.0])
        >>> drop_and_grow(weight.abs(), grad.abs(), weight != 0, 1)
        tensor([ True, False,  True,  True, False])
    """
    dropped = select(-keep, k, among=mask)
    grown = select(growth, k, among=~mask | dropped)
    return (mask & ~dropped) | grown
