"""The pieces of `make gpu`, on the CPU, so that the first run on a GPU is not their first run."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from gpu_checks import CHECKS
from gpu_speed import SMALL, by_histograms, memory_lines, selection_rows, step_rows, update_rows

CPU = torch.device("cpu")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_checks_pass_on_the_cpu(check: Callable[[torch.device], str]) -> None:
    assert check(CPU)


def test_measures_run_on_the_cpu() -> None:
    size = replace(SMALL, ways=("eager",))
    rows = [row for measure in (step_rows, update_rows, selection_rows) for row in measure(size, CPU)]
    assert len(rows) == 4
    assert all(row.ratio.ms > 0 for row in rows)
    assert memory_lines(size, CPU) == ["peak memory: measured on a GPU only"]


@pytest.mark.parametrize("k", [1, 7, 500, 999, 1000])
def test_two_histograms_select_what_a_sort_does(k: int) -> None:
    scores = torch.randint(0, 40, (1000,), generator=torch.Generator().manual_seed(0)) / 8.0  # with many ties
    order = scores.sort(descending=True, stable=True).indices[:k]
    assert torch.equal(by_histograms(scores, k).nonzero().flatten(), order.sort().values)
