"""Sparse training in PyTorch: a torch.fx compiler pass, a topology updater and a static FLOP report."""

from passes.captured import graphs
from sparsify.api import fold, sparsify
from sparsify.flops import flop_report
from sparsify.methods import Method, RigL, Static
from sparsify.report import FlopReport
from sparsify.views import draw_graph, graph_table

__all__ = [
    "FlopReport",
    "Method",
    "RigL",
    "Static",
    "draw_graph",
    "flop_report",
    "fold",
    "graph_table",
    "graphs",
    "sparsify",
]
