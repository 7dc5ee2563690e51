"""Every torchvision model that traces whole: exact at density 1, counted, masked, and left alone."""

import copy
import random

import numpy as np
import pytest
import torch
from models import LARGE_TO_TRAIN, PARTS, SMALLEST, WHOLE, ZOO, input_shape, size, swept, training_loss
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from passes import trace
from sparsify import RigL, flop_report, fold, graphs, sparsify
from sparsify.cli import load_model


def fingerprint(model: nn.Module) -> list[object]:
    """Everything that sparsify and flop_report must leave alone."""
    facts: list[object] = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    for path, module in model.named_modules():
        facts.append((path, id(type(module)), module.training, sorted(vars(module)), len(module._forward_hooks)))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [*facts, *((name, id(t), t._version) for name, t in tensors)]


def test_the_zoo_is_known() -> None:
    assert len(ZOO) == 121
    assert len(WHOLE) == 107


@pytest.mark.parametrize("name", [name for name in WHOLE if name not in SMALLEST])
def test_every_model_is_one_graph_with_every_weight_masked(name: str) -> None:
    """Of those that the tests below look at closer in the gate, they say the same."""
    model = load_model(name)
    sparse = sparsify(model, density=0.1)
    assert list(graphs(sparse)) == [""]
    layers = (nn.Conv2d, nn.Conv3d, nn.Linear, nn.MultiheadAttention)
    weights = [w for m in model.modules() if isinstance(m, layers) for w in m.parameters(recurse=False) if w.dim() > 1]
    assert len(sparse.updater.masks) == len(weights)
    assert abs(sum(sparse.updater.nonzeros.values()) - 0.1 * sum(w.numel() for w in weights)) <= 2 * len(weights)


@pytest.mark.parametrize("name", swept(WHOLE))
def test_counts_on_meta(name: str) -> None:
    model = load_model(name).eval()
    before = fingerprint(model)
    shape = input_shape(name)
    sparse = sparsify(model, density=0.1, distribution="erk", inputs=shape)  # a run proves that no weight was missed
    report = flop_report(sparse, shape)
    dense = flop_report(model, shape)
    assert fingerprint(model) == before
    assert list(graphs(sparse)) == [""]
    sparse.graph.lint()

    # Every weight is masked, with exactly the count of its density under the one rounding rule.
    masked = [layer for layer in report.layers if layer.status == "masked"]
    assert {layer.name for layer in masked} == dense.coverage.keys()
    assert all(layer.nonzeros == sparse.updater.nonzeros[layer.name] for layer in masked)
    size = sum(layer.params for layer in masked)
    assert abs(sum(layer.nonzeros for layer in masked) - 0.1 * size) <= 2 * len(masked)
    tables = {layer.name for layer in report.layers if layer.params} - {layer.name for layer in masked}
    assert all("rel_pos" in name and "no product" in report.coverage[name] for name in tables)

    # Dense MACs are half of what torch's own counter finds, where it counts.
    assert report.dense_macs == dense.dense_macs == dense.sparse_macs
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(shape, device="meta"))
    assert 2 * report.dense_macs == counter.get_total_flops()


@pytest.mark.parametrize("name", swept(WHOLE))
def test_density_one_is_exact(name: str) -> None:
    if name not in SMALLEST:
        _same_graphs_as_the_model_traces(load_model(name))
        return
    model = load_model(name, device="cpu")
    sparse = sparsify(model, density=1.0)
    assert all(density == 1.0 for density in sparse.updater.densities.values())
    shape = input_shape(name, small=True)
    normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    batch = torch.randn(2 if normed else 1, *shape[1:], generator=torch.Generator().manual_seed(0))
    for mode in (False, True):
        expected = _outputs(copy.deepcopy(model), batch, mode)
        got = _outputs(sparse, batch, mode)
        assert len(expected) == len(got)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)), f"training={mode}"


def _outputs(model: nn.Module, batch: torch.Tensor, mode: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return [t for t in pytree.tree_leaves(model.train(mode)(batch)) if isinstance(t, torch.Tensor)]


def _same_graphs_as_the_model_traces(model: nn.Module) -> None:
    sparse = sparsify(model, density=1.0)
    for mode, graph in trace(model).regions[""].graphs.items():
        nodes = [n for n in sparse.train(mode).graph.nodes if not (n.op == "call_module" and n.target.endswith("_mask"))]
        assert [(n.op, n.target) for n in nodes] == [(n.op, n.target) for n in graph.nodes]
    assert type(fold(sparse)) is type(model)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("name", swept(ZOO, SMALLEST - set(PARTS) | {"raft_small"}))
def test_training_changes_only_what_it_may(name: str) -> None:
    """On values, an ordinary step and an update; on shapes, for the larger ones of a family, an update alone."""
    on_values = name not in WHOLE or (name in SMALLEST and size(name) < LARGE_TO_TRAIN)
    device = "cpu" if on_values else "meta"
    steps = (1, 2) if on_values and (name in WHOLE or name in SMALLEST) else (1,)
    model = sparsify(load_model(name, device=device).train(), density=0.2, method=RigL(interval=len(steps)))
    updater, counts = model.updater, model.updater.nonzeros
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    updater.attach(optimizer, total_steps=8)
    for step in steps:
        before = copy.deepcopy((dict(model.named_parameters()), updater.masks))
        optimizer.zero_grad()
        training_loss(name, model, device).backward()
        optimizer.step()
        assert updater.nonzeros == counts
        if device == "cpu":
            _check_step(model, *before, update=step == steps[-1])


def _check_step(model: nn.Module, weights: dict[str, nn.Parameter], masks: dict[str, torch.Tensor], update: bool) -> None:
    """An ordinary step moves kept weights only; an update moves nothing but masks, and what they drop and grow is 0."""
    for name, weight in model.named_parameters():
        mask = model.updater.masks.get(name)
        if mask is None:
            assert not update or torch.equal(weight, weights[name])
            continue
        assert update or torch.equal(mask, masks[name])
        assert int(mask.sum()) == model.updater.nonzeros[name]
        assert not weight[~mask].any()
        stayed = mask & masks[name]
        assert not update or torch.equal(weight[stayed], weights[name][stayed])
        assert not weight[mask & ~masks[name]].any()
