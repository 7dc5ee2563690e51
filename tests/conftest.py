"""Test set-up: one thread per process, since pytest-xdist runs one process per core; and a heap that stays quick."""

import gc

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def freeze_what_is_there() -> None:
    """Keep the collector from going through all that was imported, again and again: tracing makes many objects."""
    gc.collect()
    gc.freeze()
