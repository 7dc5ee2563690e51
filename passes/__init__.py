"""Graph passes: what a model computes, and how to rewrite it onto masks. Knows nothing of training methods."""

from passes.capture.captured import Captured, graphs, install
from passes.capture.regions import Capture, trace
from passes.counting.run import record
from passes.masking.compressed import compress, decompress
from passes.masking.fold import fold_
from passes.masking.mask import Mask, masks_of
from passes.masking.rewrite import mask_weights
from passes.weights.sites import Site, find_sites

__all__ = [
    "Capture",
    "Captured",
    "Mask",
    "Site",
    "compress",
    "decompress",
    "find_sites",
    "fold_",
    "graphs",
    "install",
    "mask_weights",
    "masks_of",
    "record",
    "trace",
]
