"""What tests ask of any model: same outputs at density 1, training that keeps its masks, counts that torch agrees with."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from sparsify import RigL, sparsify

TOKENS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def outputs(model: nn.Module, inputs: dict[str, Any] | tuple[Any, ...], training: bool) -> list[Tensor]:
    torch.manual_seed(0)
    model.train(training)
    with torch.no_grad():
        result = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    result = dict(result) if isinstance(result, dict) else result
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


def assert_same_outputs(model: nn.Module, inputs: Any, modes: tuple[bool, ...] = (True, False), atol: float = 0.0) -> None:
    original, sparse = copy.deepcopy(model), sparsify(model, density=1.0)
    for training in modes:
        expected, got = outputs(original, inputs, training), outputs(sparse, inputs, training)
        assert len(expected) == len(got) > 0
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=atol, equal_nan=True)


def assert_trains(model: nn.Module, inputs: Any, loss_of: Callable[[Any], Tensor], steps: int = 24) -> None:
    """Train with updates: the loss falls by a tenth, dropped weights are 0 after every step, and counts stay."""
    sparse = sparsify(model.train(), density=0.3, method=RigL(interval=5))
    counts, before = sparse.updater.nonzeros, {n: m.clone() for n, m in sparse.updater.masks.items()}
    optimizer = torch.optim.AdamW(sparse.parameters(), 1e-2)
    sparse.updater.attach(optimizer, total_steps=steps)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(sparse(**inputs) if isinstance(inputs, dict) else sparse(*inputs))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert all(not sparse.get_parameter(n)[~mask].any() for n, mask in sparse.updater.masks.items())
    assert min(losses[-3:]) < 0.9 * losses[0], f"{losses[0]} -> {losses[-3:]}"
    assert sparse.updater.nonzeros == counts
    assert {n: int(m.sum()) for n, m in sparse.updater.masks.items()} == counts
    assert any(not torch.equal(before[n], m) for n, m in sparse.updater.masks.items())


def half_of_torch_count(model: nn.Module, inputs: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        model.eval()(*inputs)
    return counter.get_total_flops() // 2
