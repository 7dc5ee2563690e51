"""Training: what happens to masks and weights while an optimizer trains a model."""
