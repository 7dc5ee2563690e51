"""Counting: the FLOPs, parameters and bytes of any model from shapes and mask densities, without a forward pass."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from passes.macs import count
from passes.mask import Mask, masks_of
from passes.masking import Masked, leaf_class
from passes.recorder import Operation
from passes.shapes import record
from passes.shards import refuse_shards
from passes.sites import leaf_weights
from sparsify.lookup import updater_of
from sparsify.method import Method
from sparsify.report import FlopReport, Layer
from sparsify.spending import NOMINAL_STEPS, forecast


def flop_report(model: nn.Module, inputs: Any) -> FlopReport:
    """Count the FLOPs, parameters and bytes of a model, statically.

    A copy of the structure runs on meta tensors: no data, no forward pass of the model, and nothing of it changes. Counted
    is inference, whatever mode the model is in; weights that only training uses have rows with 0 MACs.

    Args:
        model: any module, sparsified or dense, on any device including meta.
        inputs: what forward takes: a tensor, a tuple of arguments, a dict of keyword arguments, a list of tensors that is
            one argument (a detector's images), or one input shape such as (1, 3, 224, 224). Where shapes depend on data,
            a copy of the model runs on these inputs and the report is marked as measured.

    Returns:
        A report; `print` shows it as a table.

    Raises:
        ValueError: the inputs do not fit the model; the message names the node.
        TypeError: `inputs` is none of the three.

    Example:
        >>> report = flop_report(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 10)), (1, 3, 8, 8))
        >>> report.dense_macs == 3 * 8 * 9 * 36 + 288 * 10
        True
    """
    args, kwargs = arguments_of(model, inputs)
    run = record(model, args, kwargs)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    products, macs, other, uncounted = _tally(run.operations, sizes)
    layers = (*_weight_layers(model, macs), *products)
    method, goals, total_steps = _training_of(model)
    final = sum(_macs_at(x.dense_macs, goals.get(x.name, x.nonzeros), x.params, x.sparse_macs) for x in layers)
    dense = sum(x.dense_macs for x in layers)
    ratio = final / dense if dense else 1.0
    return FlopReport(
        (leaf_class(model) if isinstance(model, Masked) else type(model)).__name__,
        tuple(tuple(t.shape) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)),
        method.name if method else "none",
        layers,
        *_bytes(model),
        ratio,
        method.training_ratio(ratio) if method else 1.0,
        forecast(method, ratio, total_steps) if method else 1.0,
        total_steps,
        other,
        uncounted,
        run.measured,
    )


def products_of(model: nn.Module, inputs: Any) -> tuple[dict[str, str], list[str]]:
    """Say which weights a forward pass multiplies by.

    Args:
        model: any module.
        inputs: what `flop_report` takes.

    Returns:
        ({parameter name: op}, what is read past a mask, as "name in module").
    """
    multiplied, past = {}, []
    for operation in record(model, *arguments_of(model, inputs)).operations:
        if (names := weights_of(operation)) and count(operation).macs is not None:
            op = operation.name.removeprefix("aten.")
            multiplied |= dict.fromkeys(names, _OPS.get(op, op))
            past += [f"{name} in {operation.module or type(model).__name__}" for name in operation.unmasked]
    return multiplied, past


def _training_of(model: nn.Module) -> tuple[Method | None, dict[str, int], int]:
    """Return the method, the counts it will end with where it still prunes, and the steps to forecast."""
    updater = updater_of(model)
    if updater is None:
        return None, {}, 0
    goals = {} if updater.pruned_all else {name: goal.target for name, goal in updater.goals.items()}
    return updater.method, goals, updater.total_steps or NOMINAL_STEPS


def _macs_at(dense: int, nonzeros: int, params: int, sparse: int) -> int:
    return dense * nonzeros // params if params else sparse  # products have no parameters


def arguments_of(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn what users pass as `inputs` into the positional and the keyword arguments of forward."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"flop_report() takes a torch.nn.Module, not {type(model).__name__}.")
    refuse_shards(model)
    if isinstance(inputs, (tuple, list)) and inputs and all(isinstance(n, int) and n > 0 for n in inputs):
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        return (torch.empty(tuple(inputs), dtype=dtype, device="meta"),), {}
    if isinstance(inputs, (Tensor, tuple, list, dict)) and any(
        isinstance(t, Tensor) for t in pytree.tree_leaves(inputs)
    ):
        if isinstance(inputs, dict):
            return (), inputs
        return (inputs if isinstance(inputs, tuple) else (inputs,)), {}
    raise TypeError(
        f"inputs={inputs!r} must be a tensor, a tuple of arguments, a dict of keyword arguments, a list of tensors that is "
        f"one argument, or one input shape such as (1, 3, 224, 224)."
    )


def with_values(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn what users pass as `inputs` into arguments to run a model on.

    A shape stands for random numbers, of two samples at least: batch norm in training takes no fewer.
    """
    args, kwargs = arguments_of(model, inputs)
    if isinstance(inputs, (tuple, list)) and all(isinstance(n, int) for n in inputs):
        generator = torch.Generator().manual_seed(0)
        device = next((p.device for p in model.parameters()), "cpu")
        shape = (max(2, inputs[0]), *inputs[1:])
        args = (torch.randn(shape, generator=generator).to(device, args[0].dtype),)
    return args, kwargs


_Macs = dict[str, tuple[str, int]]  # {parameter name: (op, MACs)}


def _tally(operations: list[Operation], sizes: dict[str, int]) -> tuple[list[Layer], _Macs, int, dict[str, int]]:
    """Sum up operations: rows of products, MACs per weight, other FLOPs, and what has no counter."""
    products: Counter[tuple[str, str]] = Counter()
    macs: _Macs = {}
    other, uncounted = 0, Counter[str]()
    for operation in operations:
        cost = count(operation)
        op = operation.name.removeprefix("aten.")
        weights = weights_of(operation)
        if cost.macs is None:
            other += cost.other or 0
            uncounted[op] += cost.other is None and op not in _FREE
        elif weights:
            for weight, share in _shares(cost.macs, weights, sizes).items():
                macs[weight] = (op, macs.get(weight, ("", 0))[1] + share)
        else:
            products[operation.module or operation.node or "forward", op] += cost.macs
    rows = [Layer(name, op, None, 0, 0, n, n, "product") for (name, op), n in products.items()]
    return rows, macs, other, {op: n for op, n in uncounted.most_common() if n}


def weights_of(operation: Operation) -> tuple[str, ...]:
    """Return the parameters that a product multiplies by; a parameter times a weight is an activation, and so is a query."""
    if "attention" in operation.name:
        return ()
    operands = operation.weights[operation.name in _WITH_BIAS :]
    return next((names for names in reversed(operands) if names), ())


_WITH_BIAS = ("aten.addmm", "aten.baddbmm", "aten.addmv")  # their first argument is added


def _shares(macs: int, weights: tuple[str, ...], sizes: dict[str, int]) -> dict[str, int]:
    """Divide the cost of a product among the parameters that its weight is put together of, by their sizes."""
    total, shares = sum(sizes[name] for name in weights), {}
    for name in weights[:-1]:
        shares[name] = macs * sizes[name] // total
    return shares | {weights[-1]: macs - sum(shares.values())}


# Operations that compute nothing: views, allocation, and copies of data.
_FREE = frozenset(
    """view _unsafe_view reshape t transpose permute expand select slice unsqueeze squeeze detach alias as_strided
    split split_with_sizes chunk unbind empty empty_like new_empty empty_strided clone copy_ _to_copy contiguous
    fill_ zeros ones new_zeros new_ones full arange cat stack constant_pad_nd roll lift_fresh as_strided_ zero_
    unfold _reshape_alias""".split()
)


_OUT_DIMS = {"conv": 0, "linear": 0, "conv_transpose": 1}  # of layers whose goals are not known
_OPS = {"convolution": "conv", "addmm": "linear", "mm": "linear"}


def _weight_layers(model: nn.Module, macs: _Macs) -> list[Layer]:
    masks = masks_of(model)
    updater = updater_of(model)
    rules, goals = (updater.rules, updater.goals) if updater else ({}, {})
    hidden = {w: op for module in model.modules() for _, w, op in leaf_weights(module)}
    rows = []
    for name, weight in model.named_parameters():
        if not (name in macs or name in masks or name in rules or (weight in hidden and weight.dim() >= 2)):
            continue
        op, dense = macs.get(name, (hidden.get(weight, ""), 0))
        mask = masks.get(name)
        kept = mask.nonzeros if mask else weight.numel()
        reason = "" if mask else rules.get(name, _why_unknown(model, name, name in macs))
        if "Python" in reason and name not in macs:
            reason = "read by Python code, and no product of it was seen"
        status = "masked" if mask else "unsupported" if reason.startswith("unsupported") else "dense"
        rows.append(
            Layer(
                name,
                _OPS.get(op, op),
                tuple(weight.shape),
                weight.numel(),
                kept,
                dense,
                _macs_at(dense, kept, weight.numel(), dense),
                status,
                reason.removeprefix("unsupported: "),
                _dead_outputs(mask, goals[name].out_dim if name in goals else _OUT_DIMS.get(hidden.get(weight, ""))),
            )
        )
    return rows


def _why_unknown(model: nn.Module, name: str, used: bool) -> str:
    """Say why a product reads a parameter that `sparsify` neither masked nor ruled out."""
    updater = updater_of(model)
    if updater is None:
        return ""
    if name in updater.replaced:
        return "replaced after sparsify"
    if not used:
        return "its layer is not called"
    return "a product reads it that no graph shows as a weight's, or its layer was added after sparsify"


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
