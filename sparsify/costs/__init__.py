"""Costs: what a model costs, as a report, a picture, a graph view and the ledger of a run."""
