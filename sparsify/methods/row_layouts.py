"""Row layouts: rules for the rows that a weight is cut into - constant fan-in, N of every M, patterns that outputs share."""

from functools import partial

import torch
from torch import Tensor

from passes.weights.sites import Site
from sparsify.density.distributions import kept
from sparsify.density.random_masks import uniform_numbers
from sparsify.methods.layouts import Layout
from sparsify.methods.scores import LayerState
from sparsify.methods.selection import drop_and_grow, highest_of_rows, select


def _outputs(tensor: Tensor, out_dim: int) -> Tensor:
    """Cut a weight into one row per output: (outputs, fan-in)."""
    return tensor.movedim(out_dim, 0).flatten(1)


def _from_outputs(rows: Tensor, shape: tuple[int, ...], out_dim: int) -> Tensor:
    rest = [n for d, n in enumerate(shape) if d != out_dim]
    return rows.view(shape[out_dim], *rest).movedim(0, out_dim).contiguous()


def _groups(tensor: Tensor, out_dim: int, size: int) -> Tensor:
    """Cut a weight into groups of consecutive inputs: (groups, size)."""
    return tensor.movedim(1 - out_dim, -1).reshape(-1, size)


def _from_groups(rows: Tensor, shape: tuple[int, ...], out_dim: int) -> Tensor:
    inputs = 1 - out_dim
    rest = [n for d, n in enumerate(shape) if d != inputs]
    return rows.view(*rest, shape[inputs]).movedim(-1, inputs).contiguous()


def _refill(kept: Tensor, leaving: Tensor, coming: Tensor, count: int | Tensor) -> Tensor:
    """Fill every row up to `count`: with what is kept, by |leaving|, then with the rest, by |coming|; all (rows, width)."""
    tiny = torch.finfo(torch.float64).tiny
    leaving, coming = (s.abs().double() / s.abs().double().max().clamp(min=tiny) for s in (leaving, coming))
    return highest_of_rows(torch.where(kept, leaving + 2, coming), count)  # double: adding 2 must not make ties


def _numbers(site: Site, seed: int) -> Tensor:
    return torch.from_numpy(uniform_numbers(site.size, seed, site.name)).view(site.shape)


def fan_in(ablation: float, inputs: int | None = None) -> Layout:
    """Give every output as many inputs as every other, except outputs without any (SRigL, arXiv 2305.02299).

    Args:
        ablation: gamma_sal, from 0 to 1: outputs with a smaller share of salient weights lose all of them.
        inputs: per output; None goes by the density.

    Returns:
        The layout.
    """

    return Layout(
        "fan-in",
        partial(_fan_in_count, inputs),
        _draw_fan_in,
        partial(_exchange_fan_in, ablation),
        _one_fan_in,
        refuse=_refuse_unknown,
        fixed=f"fan_in={inputs}" if inputs else "",
        exact=False,
    )


def _fan_in_count(inputs: int | None, site: Site, density: float) -> int:
    outputs = site.shape[_out_dim(site)]
    width = site.size // outputs
    if inputs is not None and inputs > width:
        raise ValueError(
            f"fan_in={inputs} is larger than the {width} inputs that an output of {site.name} has. Lower it, or keep the "
            f"layer dense with exclude=[{site.name!r}]."
        )
    return outputs * (inputs or kept(density, width))


def _draw_fan_in(site: Site, count: int, seed: int) -> Tensor:
    rows = _outputs(_numbers(site, seed), _out_dim(site))
    return _from_outputs(highest_of_rows(rows, count // len(rows)), site.shape, _out_dim(site))


def _exchange_fan_in(
    ablation: float, layer: LayerState, leaving: Tensor, coming: Tensor | None, drop: int, grow: int
) -> Tensor:
    """Drop by magnitude, ablate outputs with few salient weights, and regrow every other output to one new fan-in.

    Salient are the weights that are kept and as many of the pruned ones, by |coming|, as were dropped. The fan-in is the
    layer's budget over its active outputs, so that ablation makes the others denser.
    """
    assert coming is not None
    assert layer.out_dim is not None
    rows = partial(_outputs, out_dim=layer.out_dim)
    kept = select(leaving, drop, layer.mask, lowest=True).logical_xor_(layer.mask)
    pruned = min(drop, layer.mask.numel() - layer.nonzeros)
    salient = rows(kept | select(coming, pruned, ~layer.mask)).sum(1)  # (outputs,)
    width = layer.mask.numel() // len(salient)
    needed = highest_of_rows(salient[None], -(-layer.target // width))[0]  # outputs without which the budget has no room
    active = needed | (salient >= ablation * rows(layer.mask).sum(1).max())
    count = (layer.target // active.sum()).clamp(min=1)
    new = _refill(rows(kept), rows(leaving), rows(coming), count) & active[:, None]
    return _from_outputs(new, layer.mask.shape, layer.out_dim)


def _one_fan_in(mask: Tensor, out_dim: int | None) -> bool:
    assert out_dim is not None
    counts = _outputs(mask, out_dim).sum(1)
    return bool(((counts == 0) | (counts == counts.max())).all())


def n_of_m(n: int, m: int) -> Layout:
    """Keep exactly `n` of every `m` consecutive inputs, as sparse tensor cores want them (arXiv 2102.04010).

    Args:
        n: from 1 to `m`.
        m: the size of a group.

    Returns:
        The layout.
    """

    return Layout(
        f"{n}:{m}",
        partial(_group_count, n, m),
        partial(_draw_groups, n, m),
        partial(_exchange_groups, n, m),
        partial(_n_in_each, n, m),
        refuse=partial(_refuse_uneven, m),
        fixed=f"{n} of every {m}",
    )


def _group_count(n: int, m: int, site: Site, density: float) -> int:
    return site.size // m * n


def _draw_groups(n: int, m: int, site: Site, count: int, seed: int) -> Tensor:
    rows = _groups(_numbers(site, seed), _out_dim(site), m)
    return _from_groups(highest_of_rows(rows, n), site.shape, _out_dim(site))


def _exchange_groups(n: int, m: int, layer: LayerState, leaving: Tensor, coming: Tensor | None, drop: int, grow: int) -> Tensor:
    assert coming is not None
    assert layer.out_dim is not None
    rows = partial(_groups, out_dim=layer.out_dim, size=m)
    kept = select(leaving, drop, layer.mask, lowest=True).logical_xor_(layer.mask)
    return _from_groups(_refill(rows(kept), rows(leaving), rows(coming), n), layer.mask.shape, layer.out_dim)


def _n_in_each(n: int, m: int, mask: Tensor, out_dim: int | None) -> bool:
    assert out_dim is not None
    return bool((_groups(mask, out_dim, m).sum(1) == n).all())


def _refuse_uneven(m: int, site: Site) -> str:
    if problem := _refuse_unknown(site):
        return problem
    inputs = site.shape[1 - _out_dim(site)]
    return f"its {inputs} inputs cannot be cut into groups of {m}" if inputs % m else ""


def shared(outputs: int) -> Layout:
    """Let every so many consecutive outputs share their pattern: they look at the same inputs, which kernels then read once.

    Weights of such a group are dropped and grown together, by the sum of their |scores|.

    Args:
        outputs: of a group, at least 2.

    Returns:
        The layout.
    """
    return Layout(
        f"{outputs}x1",
        partial(_shared_count, outputs),
        partial(_draw_shared, outputs),
        partial(_exchange_shared, outputs),
        partial(_share_patterns, outputs),
        unit=partial(_group_size, outputs),
        refuse=partial(_refuse_odd, outputs),
    )


def _group_size(outputs: int, site: Site) -> int:
    return outputs


def _shared_count(outputs: int, site: Site, density: float) -> int:
    return kept(density, site.size // outputs) * outputs


def _draw_shared(outputs: int, site: Site, count: int, seed: int) -> Tensor:
    rows = _outputs(_numbers(site, seed), _out_dim(site))[::outputs]
    mask = select(rows, count // outputs, torch.ones_like(rows, dtype=torch.bool))
    return _spread_shared(outputs, mask, site.shape, _out_dim(site))


def _exchange_shared(outputs: int, layer: LayerState, leaving: Tensor, coming: Tensor | None, drop: int, grow: int) -> Tensor:
    assert layer.out_dim is not None

    def sums(scores: Tensor) -> Tensor:
        return _outputs(scores.abs(), layer.out_dim or 0).unflatten(0, (-1, outputs)).sum(1)

    mask = _outputs(layer.mask, layer.out_dim)[::outputs].contiguous()
    coming = None if coming is None else sums(coming)
    new = drop_and_grow(sums(leaving), coming, mask, drop // outputs, grow // outputs)
    return _spread_shared(outputs, new, tuple(layer.mask.shape), layer.out_dim)


def _spread_shared(outputs: int, rows: Tensor, shape: tuple[int, ...], out_dim: int) -> Tensor:
    return _from_outputs(rows.repeat_interleave(outputs, 0), shape, out_dim)


def _share_patterns(outputs: int, mask: Tensor, out_dim: int | None) -> bool:
    assert out_dim is not None
    groups = _outputs(mask, out_dim).unflatten(0, (-1, outputs))
    return bool((groups == groups[:, :1]).all())


def _refuse_odd(outputs: int, site: Site) -> str:
    if problem := _refuse_unknown(site):
        return problem
    count = site.shape[_out_dim(site)]
    return f"its {count} outputs cannot be cut into groups of {outputs}" if count % outputs else ""


def _out_dim(site: Site) -> int:
    dim = site.uses[0].out_dim
    assert dim is not None
    return dim


def _refuse_unknown(site: Site) -> str:
    return "which of its dimensions are inputs is not known" if site.uses[0].out_dim not in (0, 1) else ""
