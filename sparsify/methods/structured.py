"""Structured methods: RigL on masks that hardware likes, a constant fan-in or N of every M."""

from functools import partial

from sparsify.checks import check_between, check_whole
from sparsify.methods import costs, row_layouts
from sparsify.methods.method import Method, steady_updates


def SRigL(  # noqa: N802
    interval: int = 100,
    drop_fraction: float = 0.3,
    end_fraction: float = 0.75,
    *,
    ablation: float = 0.3,
    fan_in: int | None = None,
    drop_schedule: str = "cosine",
) -> Method:
    """Structured RigL (Lasby et al., arXiv 2305.02299): a constant fan-in, and outputs that hardly matter are ablated.

    Args:
        interval: optimizer steps between updates, at least 1.
        drop_fraction: the share of active weights dropped at the start, in (0, 1).
        end_fraction: share of training after which the topology stays as it is, in (0, 1].
        ablation: gamma_sal, in [0, 1]: an output with a smaller share of salient weights loses all of them.
        fan_in: inputs per output at the start, instead of a density.
        drop_schedule: "cosine", "constant", "linear" or "inverse_power".

    Returns:
        The method's record.

    Raises:
        ValueError: an argument is out of range or unknown.

    Example:
        >>> SRigL(fan_in=16).layout.fixed
        'fan_in=16'
    """
    if fan_in is not None:
        check_whole("fan_in", fan_in)
    check_between("ablation", ablation, closed_below=True)
    updates = steady_updates(interval, drop_fraction, end_fraction, drop_schedule)
    return Method("srigl", partial(costs.rigl, interval), updates, row_layouts.fan_in(ablation, fan_in))


def NM(  # noqa: N802
    n: int = 2,
    m: int = 4,
    interval: int = 100,
    drop_fraction: float = 0.3,
    end_fraction: float = 0.75,
    *,
    drop_schedule: str = "cosine",
) -> Method:
    """RigL with exactly `n` of every `m` consecutive inputs kept, the pattern of sparse tensor cores (arXiv 2102.04010).

    Weights whose input dimension is not a multiple of `m` stay dense by rule.

    Args:
        n: kept of every group, from 1 to `m`.
        m: size of a group, at least 2.
        interval: optimizer steps between updates, at least 1.
        drop_fraction: the share of active weights dropped at the start, in (0, 1).
        end_fraction: share of training after which the topology stays as it is, in (0, 1].
        drop_schedule: "cosine", "constant", "linear" or "inverse_power".

    Returns:
        The method's record.

    Raises:
        ValueError: an argument is out of range or unknown, or n > m.

    Example:
        >>> NM(1, 4).layout.name
        '1:4'
    """
    check_whole("n", n)
    check_whole("m", m, least=2)
    if n > m:
        raise ValueError(f"n={n} is larger than m={m}: of {m} weights at most {m} can be kept.")
    updates = steady_updates(interval, drop_fraction, end_fraction, drop_schedule)
    return Method("nm", partial(costs.rigl, interval), updates, row_layouts.n_of_m(n, m))
