"""Kernels: native code, compiled for the CPU at hand on first use."""
