"""Thumbnails: pictures of masks as a page holds them."""

import base64
from typing import Any

from torch import Tensor

from passes.masking.pictures import picture


def thumbnail(mask: Tensor, out_dim: int | None) -> dict[str, Any] | None:
    """Return a picture of a mask.

    Args:
        mask: bool, any shape.
        out_dim: the dimension that indexes outputs, if it is known.

    Returns:
        `width`, `height`, `values` (a byte for each pixel, base64) and a `caption`; None on the meta device.
    """
    if mask.is_meta:
        return None
    pixels, most = picture(mask, out_dim)
    height, width = pixels.shape
    outputs = mask.shape[out_dim or 0] if mask.dim() > 1 else 1
    inputs = mask.numel() // max(outputs, 1)
    patch = "" if (height, width) == (outputs, inputs) else f"; a pixel is the mean of a patch, the strongest {most:.0%} kept"
    values = base64.b64encode(pixels.cpu().numpy().tobytes()).decode()
    caption = f"{outputs} outputs down, {inputs} inputs across{patch}"
    return {"width": width, "height": height, "values": values, "caption": caption}
