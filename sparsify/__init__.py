"""Sparse training in PyTorch: a torch.fx compiler pass, a topology updater and a static FLOP report."""

import passes

if not hasattr(passes, "mask_weights"):
    raise ImportError(
        f"sparsify needs its own package `passes`, but Python finds {passes.__file__ or list(passes.__path__)} first. Rename "
        f"that one, or start Python from elsewhere."
    )

from passes.capture.captured import graphs
from passes.channels.small_dense import small_dense
from passes.masking.compressed import compress, decompress
from passes.masking.kernels import use_kernels
from sparsify.api import sparsify
from sparsify.costs.flops import flop_report
from sparsify.costs.ledger import cost_ledger
from sparsify.costs.report import FlopReport
from sparsify.costs.speed import SpeedReport, speed_report
from sparsify.costs.spent import CostLedger
from sparsify.costs.views import draw_graph, graph_table
from sparsify.methods import scores
from sparsify.methods.method import Method, Updates
from sparsify.methods.pruning import GMP, SNIP
from sparsify.methods.published import SET, SNFS, RigL, Static
from sparsify.methods.structured import NM, SRigL
from sparsify.saving.checkpoints import load_checkpoint, save_checkpoint
from sparsify.saving.plain import fold, lower
from sparsify.saving.sparse_files import load_sparse, read_sparse, save_sparse
from sparsify.training.ranks import ignore_in_ddp
from sparsify.training.state import Topology

__all__ = [
    "GMP",
    "NM",
    "SET",
    "SNFS",
    "SNIP",
    "CostLedger",
    "FlopReport",
    "Method",
    "RigL",
    "SRigL",
    "SpeedReport",
    "Static",
    "Topology",
    "Updates",
    "compress",
    "cost_ledger",
    "decompress",
    "draw_graph",
    "flop_report",
    "fold",
    "graph_table",
    "graphs",
    "ignore_in_ddp",
    "load_checkpoint",
    "load_sparse",
    "lower",
    "read_sparse",
    "save_checkpoint",
    "save_sparse",
    "scores",
    "small_dense",
    "sparsify",
    "speed_report",
    "use_kernels",
]
