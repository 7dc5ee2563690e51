"""Pictures: masks as small images, the kept share of each patch by its brightness."""

import torch.nn.functional as F
from torch import Tensor


def picture(mask: Tensor, out_dim: int | None, side: int = 32) -> tuple[Tensor, float]:
    """Return a mask as an image: outputs from top to bottom, their inputs from left to right.

    Args:
        mask: bool, any shape.
        out_dim: the dimension that indexes outputs, if it is known.
        side: pixels, at most; an image with fewer has one for each weight.

    Returns:
        uint8, (height, width), 255 where most is kept; and what share is kept there.

    Example:
        >>> import torch
        >>> picture(torch.tensor([[True, False], [False, False]]), 0)
        (tensor([[255,   0],
                [  0,   0]], dtype=torch.uint8), 1.0)
    """
    rows = mask.movedim(out_dim or 0, 0).flatten(1) if mask.dim() > 1 else mask[None]
    size = (min(side, rows.shape[0]), min(side, rows.shape[1]))
    pixels = F.adaptive_avg_pool2d(rows[None].float(), size)[0]
    most = float(pixels.max())
    return (pixels * (255 / most if most else 0)).round().byte(), most
