"""Capture: what fx can trace of a model, as one graph per mode, and the module that runs the graphs."""
