"""Costs: what training costs relative to dense training, 3 f_D, by the published closed forms (RigL paper, appendix H).

Each is a function of f_S, the inference FLOPs of the sparse network relative to the dense one.
"""


def sparse(inference_ratio: float) -> float:
    """Static, SET, SNIP: forward, input gradient and weight gradient are all sparse, 3 f_S.

    Example:
        >>> sparse(0.25)
        0.25
    """
    return inference_ratio


def rigl(interval: int, inference_ratio: float) -> float:
    """RigL: one dense weight gradient per interval, (3 f_S dT + 2 f_S + f_D) / (dT + 1).

    Example:
        >>> round(rigl(100, 0.4138), 4)
        0.4157
    """
    return (3 * inference_ratio * interval + 2 * inference_ratio + 1) / (interval + 1) / 3


def snfs(inference_ratio: float) -> float:
    """SNFS: a dense weight gradient in every step, 2 f_S + f_D.

    Example:
        >>> snfs(0.25)
        0.5
    """
    return (2 * inference_ratio + 1) / 3


def gmp(begin_fraction: float, end_fraction: float, inference_ratio: float) -> float:
    """Gradual pruning: the mean of 3 f_S(t); the cubic's mean is 3/4 while it rises, and 1 afterwards.

    Example:
        >>> round(gmp(700 / 87891, 0.75, 0.27), 2)  # WRN-22-2 in arXiv 2103.15767
        0.41
    """
    mean = (end_fraction - begin_fraction) * 3 / 4 + 1 - end_fraction
    return 1 - (1 - inference_ratio) * mean
