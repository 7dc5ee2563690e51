"""Method x optimizer x precision x execution x accumulation: every pair of choices in the gate, everything with `-m sweep`."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from models import SmallNet
from test_methods import TABLE, assert_layout
from test_updates import OPTIMIZERS, X, Y, assert_sparse
from torch import nn

from sparsify import sparsify

PRECISIONS = ("fp32", "bf16", "amp")
EXECUTIONS = ("eager", "compile")
ACCUMULATIONS = (1, 2)
AXES = (tuple(TABLE), tuple(OPTIMIZERS), PRECISIONS, EXECUTIONS, ACCUMULATIONS)
STEPS = 12


def sample() -> list[tuple]:
    """Cover every pair of choices: all pairs of method and optimizer, few of them compiled, since that takes seconds."""
    rows = []
    for (i, method), (j, optimizer) in itertools.product(enumerate(AXES[0]), enumerate(AXES[1])):
        compiled = i == j % len(AXES[0])
        rows.append((method, optimizer, PRECISIONS[(i + j) % 3], EXECUTIONS[compiled], ACCUMULATIONS[(i // 2 + j) % 2]))
    return rows


def test_the_sample_covers_every_pair() -> None:
    for a, b in itertools.combinations(range(len(AXES)), 2):
        assert {(row[a], row[b]) for row in sample()} == set(itertools.product(AXES[a], AXES[b])), (a, b)


def check(name: str, make_optimizer: str, precision: str, execution: str, accumulation: int) -> None:
    torch.manual_seed(0)
    method = TABLE[name]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = sparsify(SmallNet().to(dtype), None if method.layout.fixed else 0.3, method=method)
    optimizer = OPTIMIZERS[make_optimizer](model.parameters())
    model.updater.attach(optimizer, total_steps=STEPS)
    torch._dynamo.reset()
    # What dynamo does to the code is the same for every backend; this one compiles nothing.
    forward = torch.compile(model, backend="aot_eager", fullgraph=True) if execution == "compile" else model
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=precision == "amp")
    first = {n: mask.clone() for n, mask in model.updater.masks.items()}
    for _ in range(STEPS):
        optimizer.zero_grad()
        for x, y in zip(X.to(dtype).chunk(accumulation), Y.chunk(accumulation), strict=True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "amp"):
                loss = F.cross_entropy(forward(x).float(), y) / accumulation
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert_sparse(model)
    assert_layout(model)
    changed = any(not torch.equal(first[n], mask) for n, mask in model.updater.masks.items())
    assert changed == (method.updates is not None)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert isinstance(model, nn.Module)
    assert all(parameter.dtype == dtype for parameter in model.parameters())


@pytest.mark.parametrize("row", sample(), ids=lambda row: "-".join(map(str, row)))
def test_every_pair(row: tuple) -> None:
    check(*row)


@pytest.mark.sweep
@pytest.mark.parametrize("row", list(itertools.product(*AXES)), ids=lambda row: "-".join(map(str, row)))
def test_everything(row: tuple) -> None:
    check(*row)
