"""Test set-up: one thread per process, since pytest-xdist runs one process per core."""

import torch

torch.set_num_threads(1)
