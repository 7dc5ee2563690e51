"""Weights: which parameters of a model multiply activations, and where."""
