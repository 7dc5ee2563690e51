"""What version 0.1 wrote is read: `tests/data/0.1` holds states, checkpoints and a sparse file of before the files moved."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsify import GMP, SNFS, RigL, load_checkpoint, load_sparse, sparsify

OLD = Path(__file__).parent / "data" / "0.1"
FACTS = json.loads((OLD / "facts.json").read_text())
METHODS = {"rigl": RigL(interval=4), "snfs": SNFS(interval=4), "gmp": GMP(interval=4)}


def make(method: str) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    return sparsify(net, density=0.2, method=METHODS[method])


def check(model: nn.Module, facts: dict) -> None:
    updater = model.updater
    assert updater.step == facts["step"]
    assert updater.nonzeros == facts["nonzeros"]
    assert [[entry.step, entry.nonzeros] for entry in updater.history] == facts["history"]
    assert model[4].weight.detach().double().sum().item() == pytest.approx(facts["weight_sum"], abs=1e-9)
    for name, mask in updater.masks.items():
        assert int(mask.sum()) == facts["nonzeros"][name]


@pytest.mark.parametrize("method", METHODS)
def test_checkpoints(method: str) -> None:
    model = make(method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model.updater.attach(optimizer, total_steps=40)
    assert load_checkpoint(OLD / f"{method}.pt", model=model, optimizer=optimizer) == {"epoch": 3}
    check(model, FACTS[method])
    for _ in range(22):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    assert model.updater.step == 40
    again = make(method)
    again.load_state_dict(model.state_dict())  # in today's form
    assert again.updater.history == model.updater.history


def test_state_dict() -> None:
    model = make("rigl")
    model.load_state_dict(torch.load(OLD / "state_dict.pt", weights_only=True))
    check(model, FACTS["rigl"])


def test_sparse_file() -> None:
    model = load_sparse(make("rigl"), OLD / "net.safetensors")
    assert model.updater.nonzeros == FACTS["rigl"]["nonzeros"]
    assert model[4].weight.detach().double().sum().item() == pytest.approx(FACTS["rigl"]["weight_sum"], abs=1e-9)
