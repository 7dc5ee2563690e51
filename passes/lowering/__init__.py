"""Lowering: a trained network as one that does less: batch norms folded, dead channels removed."""
