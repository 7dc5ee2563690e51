"""Graph passes: what a model computes, and how to rewrite it onto masks. Knows nothing of training methods."""

from passes.capture import Capture, trace
from passes.captured import Captured, graphs, install
from passes.fold import fold_
from passes.mask import Mask, masks_of
from passes.masking import mask_weights
from passes.shapes import record
from passes.sites import Site, find_sites

__all__ = [
    "Capture",
    "Captured",
    "Mask",
    "Site",
    "find_sites",
    "fold_",
    "graphs",
    "install",
    "mask_weights",
    "masks_of",
    "record",
    "trace",
]
