"""Method x optimizer x precision x execution x accumulation: every pair of choices in the gate, everything with `-m sweep`."""

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import SmallNet
from test_methods import TABLE, assert_layout
from test_updates import OPTIMIZERS, X, Y, assert_sparse

from sparsify import Method, sparsify

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


@dataclass
class Loop:
    """One model in training."""

    method: Method
    optimizer_name: str
    precision: str
    execution: str
    accumulation: int

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        density = None if self.method.layout.fixed else 0.3
        self.model = sparsify(SmallNet().to(self.dtype), density, method=self.method)
        self.optimizer = OPTIMIZERS[self.optimizer_name](self.model.parameters())
        # What dynamo does to the code is the same for every backend; this one compiles nothing.
        compiled = self.execution == "compile"
        self.forward = torch.compile(self.model, backend="aot_eager", fullgraph=True, disable=not compiled)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=self.precision == "amp")

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            parts = zip(X.to(self.dtype).chunk(self.accumulation), Y.chunk(self.accumulation), strict=True)
            for x, y in parts:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.precision == "amp"):
                    loss = F.cross_entropy(self.forward(x).float(), y) / self.accumulation
                self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            assert_sparse(self.model)


def check(name: str, *choices: Any) -> None:
    """Train, stop halfway and go on in another model: invariants at every step, and the same end to the bit."""
    torch._dynamo.reset()
    loop, twin = Loop(TABLE[name], *choices), Loop(TABLE[name], *choices)
    first = {n: mask.clone() for n, mask in loop.model.updater.masks.items()}
    loop.model.updater.attach(loop.optimizer, total_steps=STEPS)
    loop.run(STEPS // 2 + 1)
    twin.model.load_state_dict(copy.deepcopy(loop.model.state_dict()))
    twin.optimizer.load_state_dict(copy.deepcopy(loop.optimizer.state_dict()))
    for a, b in zip(loop.model.parameters(), twin.model.parameters(), strict=True):
        if "mu_product" in loop.optimizer.state[a]:  # of NAdam, which torch rounds to the weight's precision on loading
            twin.optimizer.state[b]["mu_product"] = loop.optimizer.state[a]["mu_product"].clone()
    twin.model.updater.attach(twin.optimizer, total_steps=STEPS)
    for part in (loop, twin):
        part.run(STEPS - STEPS // 2 - 1)
        assert_layout(part.model)
        assert all(p.dtype == part.dtype and p.isfinite().all() for p in part.model.parameters())
    changed = any(not torch.equal(first[n], mask) for n, mask in loop.model.updater.masks.items())
    assert changed == (loop.method.updates is not None)
    for key, value in loop.model.state_dict().items():
        assert torch.equal(value, twin.model.state_dict()[key]), key


@pytest.mark.parametrize("row", sample(), ids=lambda row: "-".join(map(str, row)))
def test_every_pair(row: tuple) -> None:
    check(*row)


@pytest.mark.sweep
@pytest.mark.parametrize("row", list(itertools.product(*AXES)), ids=lambda row: "-".join(map(str, row)))
def test_everything(row: tuple) -> None:
    check(*row)
