"""Thumbnails: masks as small pictures, the kept share of each patch by its brightness."""

import base64
from typing import Any

import torch.nn.functional as F
from torch import Tensor

_SIDE = 32  # pixels


def thumbnail(mask: Tensor, out_dim: int | None) -> dict[str, Any] | None:
    """Return a mask as a picture: outputs from top to bottom, their inputs from left to right.

    Args:
        mask: bool, any shape.
        out_dim: the dimension that indexes outputs, if it is known.

    Returns:
        `width`, `height`, `values` (a byte for each pixel, base64) and a `caption`; None on the meta device.
    """
    if mask.is_meta:
        return None
    rows = mask.movedim(out_dim or 0, 0).flatten(1) if mask.dim() > 1 else mask[None]
    height, width = min(_SIDE, rows.shape[0]), min(_SIDE, rows.shape[1])
    pixels = F.adaptive_avg_pool2d(rows[None].float(), (height, width))[0]
    most = float(pixels.max())
    values = (pixels * (255 / most if most else 0)).round().byte().cpu().numpy().tobytes()
    patch = "" if (height, width) == tuple(rows.shape) else f"; a pixel is the mean of a patch, the strongest {most:.0%} kept"
    caption = f"{rows.shape[0]} outputs down, {rows.shape[1]} inputs across{patch}"
    return {"width": width, "height": height, "values": base64.b64encode(values).decode(), "caption": caption}
