"""Counting: what a forward pass costs, by shapes alone wherever they do not depend on data."""
