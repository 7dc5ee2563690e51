"""Counting: what a forward pass costs, by shapes alone."""
