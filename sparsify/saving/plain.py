"""Plain models: dense ones of the user's own class, with the masks baked in, as they were or with less to compute."""

from typing import Any

from torch import nn

from passes.capture.copies import copied
from passes.counting.inputs import forward_values
from passes.lowering.lower import BACKENDS, lower_
from passes.lowering.segment import refuse_lowered
from passes.masking.fold import fold_
from passes.masking.mask import masks_of
from passes.shards import refuse_shards
from sparsify.training.lookup import updater_of, where_sparse


def fold(model: nn.Module) -> nn.Module:
    """Return a plain dense copy of a sparsified model, with the masks baked in.

    The copy has the original class, runs the original forward, exports and loads like any other model, and its `state_dict`
    has the keys that the original had (`passes.masking.fold` says what differs for weights that are transformed before use).
    It costs what the dense model costs.

    Args:
        model: a model that `sparsify` returned; it is not changed.

    Returns:
        A model of the user's own class, in the same mode.

    Raises:
        ValueError: the model has no masks, or its method has not pruned anything yet.

    Example:
        >>> from sparsify import sparsify
        >>> plain = fold(sparsify(nn.Sequential(nn.Linear(8, 8)), density=0.5))
        >>> type(plain).__name__, int((plain[0].weight != 0).sum()), list(plain.state_dict())
        ('Sequential', 32, ['0.weight', '0.bias'])
    """
    if not isinstance(model, nn.Module) or not masks_of(model) or not updater_of(model):
        raise ValueError(f"fold() takes the model that sparsify() returned; {where_sparse(model)}.")
    refuse_shards(model)
    plain = copied(model)
    updater = updater_of(plain)
    assert updater is not None
    if not updater.pruned:
        raise ValueError(
            f"Nothing is pruned yet: method {updater.method.name!r} starts dense and prunes while it trains. Train first; "
            f"to fold masks without training, sparsify with method='static'."
        )
    updater.remove()
    return fold_(plain)


def lower(model: nn.Module, inputs: Any, *, backend: str = "auto") -> nn.Module:
    """Return a copy of a trained model that computes the same with less: for inference.

    Masks are folded, batch norms are folded into the layers before them, and dead channels are removed: those that no kept
    weight feeds or reads, consistently through additions, concatenations and depthwise convolutions. Then parts of the graph
    become segments, which run on sparse kernels on the CPU where these are faster than torch.

    Args:
        model: one that `sparsify` returned, or any dense one, in evaluation mode, with real tensors; it is not changed.
        inputs: what `flop_report` takes; the copy runs on them. Later ones may have other sizes.
        backend: "auto" chooses kernels or torch by a model of the machine, "measured" by timing both, "native" takes the
            kernels wherever they know the operation, "torch" never: a dense network, for export to other engines.

    Returns:
        An instance of the model's own class whose graphs are those of evaluation.

    Raises:
        TypeError: `model` is not a module.
        ValueError: it is in training mode, on the meta device, sharded, not pruned yet, or does not fit the inputs; the
            backend is unknown.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
        >>> _ = model[2].weight.data[:, 4:].zero_()  # nothing reads the last two hidden units
        >>> lower(model, (1, 8), backend="torch")[0].weight.shape
        torch.Size([4, 8])
    """
    if backend not in BACKENDS:
        raise ValueError(f"Unknown backend {backend!r}. Choose one of: {', '.join(BACKENDS)}.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"lower() takes a torch.nn.Module, not {type(model).__name__}.")
    refuse_lowered(model, "lower")
    if any(module.training for module in model.modules()):
        raise ValueError(
            "lower() is for inference, and the model or a part of it is in training mode. Call model.eval() first."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("The model is on the meta device, where weights have no values. Give it some first: model.to_empty().")
    refuse_shards(model)
    args, kwargs = forward_values(model, inputs)
    return lower_(fold(model) if masks_of(model) else copied(model), args, kwargs, backend)
