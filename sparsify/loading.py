"""Loading: what has to hold before a state_dict is taken over, and what follows from it afterwards."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from passes.masking import masks_of, zero_dropped_


def check_before_load(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Refuse masks that do not fit, before anything is loaded."""
    counts = state_dict.get(f"{prefix}updater._extra_state", {}).get("nonzeros", {})
    for name, mask in masks_of(model).items():
        saved = state_dict.get(f"{prefix}{name}_mask.mask")
        if saved is None:
            continue
        if saved.shape != mask.mask.shape or saved.dtype != torch.bool:
            found = f"{tuple(saved.shape)} {saved.dtype}"
            raise ValueError(
                f"The state_dict's mask of {name} is {found}, the model's is {tuple(mask.mask.shape)} torch.bool."
            )
        total = int(saved.sum()) if not saved.is_meta else None
        if total == 0 or (name in counts and total not in (None, int(counts[name]))):
            raise ValueError(
                f"The state_dict's mask of {name} keeps {total} weights, its own count says "
                f"{int(counts[name]) if name in counts else 'nothing'}: the file is damaged or was edited."
            )


def settle_after_load(model: nn.Module) -> None:
    """Make counts and zeros follow what was loaded."""
    for name, mask in masks_of(model).items():
        if not mask.mask.is_meta:
            mask.nonzeros = int(mask.mask.sum())
            with torch.no_grad():
                zero_dropped_(model.get_parameter(name), mask.mask)
