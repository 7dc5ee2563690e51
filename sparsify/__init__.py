"""Sparse training in PyTorch: a torch.fx compiler pass, a topology updater and a static FLOP report."""

import passes

if not hasattr(passes, "mask_weights"):
    raise ImportError(
        f"sparsify needs its own package `passes`, but Python finds {passes.__file__ or list(passes.__path__)} first. Rename "
        f"that one, or start Python from elsewhere."
    )

from passes.captured import graphs
from sparsify.api import fold, sparsify
from sparsify.checkpoints import load_checkpoint, save_checkpoint
from sparsify.flops import flop_report
from sparsify.history import Topology
from sparsify.ledger import CostLedger, cost_ledger
from sparsify.method import Method, Updates
from sparsify.methods import SET, SNFS, RigL, Static
from sparsify.pruning import GMP, SNIP
from sparsify.ranks import ignore_in_ddp
from sparsify.report import FlopReport
from sparsify.small_dense import small_dense
from sparsify.sparse_files import load_sparse, read_sparse, save_sparse
from sparsify.structured import NM, SRigL
from sparsify.views import draw_graph, graph_table

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
    "Static",
    "Topology",
    "Updates",
    "cost_ledger",
    "draw_graph",
    "flop_report",
    "fold",
    "graph_table",
    "graphs",
    "ignore_in_ddp",
    "load_checkpoint",
    "load_sparse",
    "read_sparse",
    "save_checkpoint",
    "save_sparse",
    "small_dense",
    "sparsify",
]
