"""FLOPs: the report of any model, from one count of a forward pass and the densities of the masks."""

import math
from typing import Any

from torch import Tensor, nn

from passes.counting.tally import Tally, tally
from passes.masking.layers import Masked, leaf_class
from passes.masking.mask import Mask, masks_of
from passes.weights.reasons import Reason, Why
from passes.weights.sites import leaf_weights
from sparsify.costs.page import page
from sparsify.costs.report import FlopReport, Layer, Source, counts_of
from sparsify.methods.costs import NOMINAL_STEPS, forecast
from sparsify.methods.method import Method
from sparsify.training.lookup import updater_of


def flop_report(model: nn.Module, inputs: Any) -> FlopReport:
    """Count the FLOPs, parameters and bytes of a model, statically.

    A copy of the structure runs on meta tensors: no data, no forward pass of the model, and nothing of it changes. Counted
    is inference, also in training mode; weights that only training uses have rows with 0 MACs. Of a lowered model, which has
    no masks any more, counted are dense products of what is left of it.

    Args:
        model: any module, sparsified or dense, on any device including meta.
        inputs: what forward takes: a tensor, a tuple of arguments, a dict of keyword arguments, a list of tensors that is
            one argument (a detector's images), or one input shape such as (1, 3, 224, 224). Where shapes depend on data,
            a copy of the model runs on these inputs and the report is marked as measured.

    Returns:
        A report; `print` shows it as a table.

    Raises:
        ValueError: the inputs do not fit the model; the message names the node.
        TypeError: `inputs` is something else.

    Example:
        >>> report = flop_report(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 10)), (1, 3, 8, 8))
        >>> report.dense_macs == 3 * 8 * 9 * 36 + 288 * 10
        True
    """
    costs = tally(model, inputs)
    products = [Layer(name, op, None, 0, 0, n, n, "product") for (name, op), n in costs.products.items()]
    layers = (*_weight_layers(model, costs), *products)
    method, goals, total_steps = _training_of(model)
    final = sum(_macs_at(x.dense_macs, goals.get(x.name, x.nonzeros), x.params, x.sparse_macs) for x in layers)
    ratio = final / costs.macs if costs.macs else 1.0
    return FlopReport(
        (leaf_class(model) if isinstance(model, Masked) else type(model)).__name__,
        costs.inputs,
        method.name if method else "none",
        layers,
        *_bytes(model),
        ratio,
        method.training_ratio(ratio) if method else 1.0,
        forecast(method, ratio, total_steps) if method else 1.0,
        total_steps,
        costs.other,
        costs.uncounted,
        costs.measured,
        Source(model, counts_of(model), page),
    )


def _training_of(model: nn.Module) -> tuple[Method | None, dict[str, int], int]:
    """Return the method, the counts it will end with where it still prunes, and the steps to forecast."""
    updater = updater_of(model)
    if updater is None:
        return None, {}, 0
    goals = {} if updater.pruned_all else {name: goal.target for name, goal in updater.goals.items()}
    return updater.method, goals, updater.total_steps or NOMINAL_STEPS


def _macs_at(dense: int, nonzeros: int, params: int, sparse: int) -> int:
    return dense * nonzeros // params if params else sparse  # products have no parameters


_OUT_DIMS = {"conv": 0, "linear": 0, "conv_transpose": 1}  # of layers whose goals are not known


def _weight_layers(model: nn.Module, costs: Tally) -> list[Layer]:
    masks = masks_of(model)
    updater = updater_of(model)
    reasons, goals = (updater.reasons, updater.goals) if updater else ({}, {})
    hidden = {w: op for module in model.modules() for _, w, op in leaf_weights(module)}
    rows = []
    for name, weight in model.named_parameters():
        if not (name in costs.weights or name in masks or name in reasons or (weight in hidden and weight.dim() >= 2)):
            continue
        dense = costs.weights.get(name, 0)
        mask = masks.get(name)
        shape = tuple(mask.mask.shape if mask else weight.shape)  # of a compressed one, that of the whole
        size = math.prod(shape)
        kept = mask.nonzeros if mask else size
        reason = None if mask else reasons.get(name) or _why_unknown(model, name, name in costs.weights)
        if reason and reason.in_python and name not in costs.weights:
            reason = Reason(Why.RULE, "read by Python code, and no product of it was seen")
        unsupported = reason is not None and reason.why is Why.UNSUPPORTED
        rows.append(
            Layer(
                name,
                costs.ops.get(name, hidden.get(weight, "")),
                shape,
                size,
                kept,
                dense,
                _macs_at(dense, kept, size, dense),
                "masked" if mask else "unsupported" if unsupported else "dense",
                (reason.sentence if unsupported else str(reason)) if reason else "",
                _dead_outputs(mask, goals[name].out_dim if name in goals else _OUT_DIMS.get(hidden.get(weight, ""))),
            )
        )
    return rows


def _why_unknown(model: nn.Module, name: str, used: bool) -> Reason | None:
    """Say why a product reads a parameter that `sparsify` neither masked nor ruled out."""
    updater = updater_of(model)
    if updater is None:
        return None
    if name in updater.replaced:
        return Reason(Why.RULE, "replaced after sparsify")
    if not used:
        return Reason(Why.RULE, "its layer is not called")
    return Reason(Why.RULE, "a product reads it that no graph shows as a weight's, or its layer was added after sparsify")


def _dead_outputs(mask: Mask | None, dim: int | None) -> int:
    if mask is None or mask.mask.is_meta or dim is None:
        return 0
    rows = mask.mask.movedim(dim, 0).flatten(1).cpu().numpy()  # numpy's `any` stops at the first True
    return rows.shape[0] - int(rows.any(axis=1).sum())


def _bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of a file that holds parameters and buffers: dense, and with kept weights and 1 mask bit per weight."""
    masks = masks_of(model)
    own = {id(buffer) for m in model.modules() if isinstance(m, Mask) for buffer in m.buffers()}
    state = model.state_dict(keep_vars=True).items()
    persistent = [t for k, t in state if isinstance(t, Tensor) and id(t) not in own and not k.startswith("updater.")]
    dense = sum({id(t): t.numel() * t.element_size() for t in persistent}.values())
    saved = 0
    for name, mask in masks.items():
        if mask.density < 1:
            size, kept = mask.mask.numel(), mask.nonzeros
            saved += (size - kept) * model.get_parameter(name).element_size() - -(-size // 8)
    return dense, dense - saved
