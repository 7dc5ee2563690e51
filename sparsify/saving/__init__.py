"""Saving: checkpoints and sparse files that are whole or not there."""
