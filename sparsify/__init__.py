"""Sparse training in PyTorch: a torch.fx compiler pass, a topology updater and a static FLOP report."""

from passes.capture import graphs
from sparsify.api import fold, sparsify
from sparsify.methods import Method, RigL, Static
from sparsify.report import FlopReport, flop_report

__all__ = ["FlopReport", "Method", "RigL", "Static", "flop_report", "fold", "graphs", "sparsify"]
