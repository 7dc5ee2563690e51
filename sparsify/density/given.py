"""Given masks: those of another model, or of a mapping, instead of a density."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from passes.masking.mask import masks_of
from passes.weights.reasons import Reason, Why
from passes.weights.sites import Site


def given_masks(masks: Any) -> dict[str, Tensor]:
    """Turn what users pass as `masks` into {parameter name: bool mask}.

    Raises:
        ValueError: it is neither a model that is sparse, by its masks or by zeros in its weights, nor such a mapping.
    """
    if isinstance(masks, nn.Module) and masks_of(masks):
        if all(mask.density == 1 for mask in masks_of(masks).values()):
            raise ValueError("masks is a model whose masks keep everything: nothing is pruned yet. Train it first.")
        return {name: mask.mask for name, mask in masks_of(masks).items()}
    if isinstance(masks, nn.Module):
        kept = {name: p.detach() != 0 for name, p in masks.named_parameters() if p.dim() > 1 and not p.is_meta}
        if not all(mask.all() for mask in kept.values()):
            return kept
        raise ValueError("masks is a model that has neither masks nor zeros in its weights. Prune it first.")
    if not isinstance(masks, Mapping) or not masks:
        raise ValueError(f"masks takes a sparse model or {{parameter name: bool mask}}, not {masks!r}.")
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"The mask of {name} is {found}, not torch.bool; `weight != 0` makes one of zeros in a weight.")
    return dict(masks)


def check_given(
    masks: Any, given: Mapping[str, Tensor], sites: Sequence[Site], rules: Mapping[str, Reason]
) -> dict[str, Tensor]:
    """Return the masks of the sites; `rules` says why other weights are dense.

    Raises:
        ValueError: at the first mask that does not fit the model, or weight that has none.
    """
    by_name = {site.name: site for site in sites}
    zeros = isinstance(masks, nn.Module) and not masks_of(masks)  # embeddings may have some too
    for name, why in rules.items() if zeros else ():
        if why.why is Why.UNSUPPORTED and name in given and not given[name].all():
            raise ValueError(
                f"{name} has zeros, which training would fill, since it cannot be masked: "
                f"{why.sentence}. Mask it as it is read with include=[{name!r}], or let it become dense "
                f"with exclude=[{name!r}]."
            )
    masks = {name: mask for name, mask in given.items() if name in by_name or not zeros}
    for name, mask in masks.items():
        if name not in by_name:
            raise ValueError(
                f"masks are of another architecture: the first that does not fit is {name}, which this model has no maskable "
                f"weight for."
            )
        if tuple(mask.shape) != by_name[name].shape:
            raise ValueError(
                f"masks are of another architecture: the first that does not fit is {name}, of shape {tuple(mask.shape)}; the "
                f"model's weight has {by_name[name].shape}."
            )
        if mask.is_meta:
            raise ValueError(f"The mask of {name} is on the meta device, where masks have no values.")
        if not mask.any():
            raise ValueError(f"The mask of {name} keeps no weight; at least one of every layer must stay.")
    if missing := [site.name for site in sites if site.name not in masks]:
        raise ValueError(
            f"masks has none for {missing[0]}: they are of another architecture, or the weight is to stay dense "
            f"(exclude=[{missing[0]!r}])."
        )
    return masks
