"""Lowered models on the native kernels: equal to torch on every kind of layer, shape and input."""

import copy
import io
import json
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from test_lowering import give_statistics
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from passes.kernels.cache import lanes
from passes.kernels.compiler import native
from passes.lowering.interpret import interpret
from passes.lowering.lower import left_in_torch
from passes.lowering.plan import Plan
from passes.lowering.program import Program
from passes.lowering.run import _PLANS, prepared
from passes.lowering.segment import Segment
from passes.lowering.windows import Window
from sparsify import cli, flop_report, lower, sparsify, speed_report, use_kernels
from sparsify.cli import load_model

pytestmark = pytest.mark.skipif(native() is None, reason="there is no C++ compiler here")


def thin(model: nn.Module, density: float = 0.3, seed: int = 0) -> nn.Module:
    """Zero a share of every weight, whole outputs and inputs among them, and fill in what begins at 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
                module.weight.mul_(torch.rand(module.weight.shape, generator=generator) < density)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def plans(lowered: nn.Module, *inputs: Tensor) -> list[Plan | str]:
    """The plan of every segment of a model on some inputs."""
    found: list[Plan | str] = []
    segments = [m for m in lowered.modules() if isinstance(m, Segment)]
    handles = [
        s.register_forward_pre_hook(lambda s, given: found.append(prepared(given, s.values, s.bits, s.program)))
        for s in segments
    ]
    with torch.no_grad():
        lowered(*inputs)
    for handle in handles:
        handle.remove()
    return found


def assert_lowered(model: nn.Module, *inputs: Tensor, others: tuple[Tensor, ...] = (), segments: int | None = 1) -> nn.Module:
    """Lower for the kernels, and compare on the inputs and on others, where the kernels must have run too.

    NaN, which another call leaves in the memory of activations, is not seen.
    """
    lowered = lower(model, inputs, backend="native")
    for given in [inputs, *((x,) for x in others)]:
        with torch.no_grad():
            lowered(*(torch.full_like(x, torch.nan) for x in given))
            expected, got = model(*given), lowered(*given)
        scale = expected[expected.isfinite()].abs().max()
        assert torch.equal(expected.isfinite(), got.isfinite())
        assert ((expected - got).nan_to_num(0, 0, 0).abs().max() <= 1e-5 * scale) or scale == 0
        found = plans(lowered, *given)
        assert all(isinstance(plan, Plan) for plan in found), found
        assert segments is None or len(found) == segments
    return lowered


class Calls(nn.Module):
    """Layers, and a function that says how they are called."""

    def __init__(self, call: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._call = [call]  # not traced as an attribute

    def forward(self, x: Tensor) -> Tensor:
        return self._call[0](x, *self.layers)


def conv(ins: int, outs: int, kernel: Any, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(ins, outs, kernel, **options)


IMAGES = {
    "1x1": lambda: nn.Sequential(conv(5, 7, 1)),
    "3x3": lambda: nn.Sequential(conv(5, 7, 3, padding=1)),
    "no padding": lambda: nn.Sequential(conv(5, 8, 3), nn.ReLU(), conv(8, 4, 3)),
    "more padding than the kernel needs": lambda: nn.Sequential(conv(5, 8, 3, padding=3)),
    "stride 2": lambda: nn.Sequential(conv(5, 8, 3, stride=2, padding=1), conv(8, 4, 1)),
    "stride 2 of one pixel": lambda: nn.Sequential(conv(5, 8, 1, stride=2)),
    "stem": lambda: nn.Sequential(conv(5, 8, 7, stride=2, padding=3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
    "stride 4": lambda: nn.Sequential(conv(5, 8, 11, stride=4, padding=2)),
    "strides that differ": lambda: nn.Sequential(conv(5, 8, 3, stride=(2, 3), padding=(0, 2))),
    "dilated": lambda: nn.Sequential(conv(5, 8, 3, padding=2, dilation=2), conv(8, 8, 3, padding=6, dilation=6)),
    "dilated and strided": lambda: nn.Sequential(conv(5, 8, 3, stride=2, padding=3, dilation=3)),
    "rows and columns": lambda: nn.Sequential(conv(5, 8, (1, 7), padding=(0, 3)), conv(8, 4, (7, 1), padding=(3, 0))),
    "same": lambda: nn.Sequential(conv(5, 8, 5, padding="same"), nn.ReLU6(), conv(8, 8, 3, padding="same", dilation=2)),
    "grouped": lambda: nn.Sequential(conv(5, 12, 1), conv(12, 8, 3, padding=1, groups=4)),
    "depthwise": lambda: nn.Sequential(conv(5, 6, 1), conv(6, 6, 5, padding=2, groups=6), conv(6, 12, 3, stride=2, groups=6)),
    "batch norm before": lambda: nn.Sequential(nn.BatchNorm2d(5), nn.ReLU(), conv(5, 8, 3, padding=1)),
    "batch norm after": lambda: nn.Sequential(conv(5, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Hardswish()),
    "activations": lambda: nn.Sequential(
        *(
            m
            for f in (nn.SiLU(), nn.GELU(), nn.Sigmoid(), nn.Tanh(), nn.Hardsigmoid(), nn.Hardtanh(-0.1, 0.2), nn.GELU("tanh"))
            for m in (conv(5, 5, 1), f)
        )
    ),
    "average": lambda: nn.Sequential(nn.AvgPool2d(2), conv(5, 8, 3, padding=1), nn.AvgPool2d(3, 1, 1)),
    "ceil": lambda: nn.Sequential(
        conv(5, 8, 1), nn.MaxPool2d(3, 2, ceil_mode=True), conv(8, 8, 1), nn.MaxPool2d(2, 2, 1, ceil_mode=True)
    ),
    "pool alone": lambda: nn.Sequential(
        nn.MaxPool2d(3, 1, 1), conv(5, 8, 1), nn.MaxPool2d((2, 3), (3, 1), (1, 0), dilation=(2, 1))
    ),
    "classifier": lambda: nn.Sequential(
        conv(5, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)
    ),
    "flattened": lambda: nn.Sequential(
        conv(5, 4, 3, padding=1), nn.AdaptiveAvgPool2d((9, 11)), nn.Flatten(), nn.Linear(4 * 99, 6)
    ),
    "one pixel": lambda: nn.Sequential(conv(5, 6, (9, 11)), nn.ReLU(), conv(6, 7, 3, padding=1)),
    "a residual": lambda: Calls(lambda x, a, b: (b(a(x).relu()) + x).relu(), conv(5, 8, 3, padding=1), conv(8, 5, 1)),
    "twice the same": lambda: Calls(lambda x, a, b: b(x := a(x)) * x + x, conv(5, 8, 1), conv(8, 8, 3, padding=1)),
    "a residual through a layer": lambda: Calls(
        lambda x, a, b, c: (a(x) + b(x)).relu() + c(x), *(conv(5, 8, 1, stride=2) for _ in range(3))
    ),
    "joined": lambda: Calls(
        lambda x, a, b, c: c(torch.cat([a(x), x, b(a(x))], 1)),
        conv(5, 4, 3, padding=1),
        conv(4, 3, 1),
        conv(12, 6, 3, padding=1),
    ),
    "dense joins": lambda: Calls(
        lambda x, a, b, c: c(torch.cat([x, y := a(x), b(torch.cat([x, y], 1))], 1).relu()),
        conv(5, 4, 1),
        conv(9, 3, 3, padding=1),
        conv(12, 6, 1),
    ),
    "a gate": lambda: Calls(
        lambda x, a, b, c: c(a(x) * torch.sigmoid(b(F.adaptive_avg_pool2d(a(x), 1)))),
        conv(5, 8, 3, padding=1),
        conv(8, 8, 1),
        conv(8, 4, 1),
    ),
    "mean": lambda: Calls(lambda x, a, b: b(a(x).mean([2, 3])), conv(5, 8, 3), nn.Linear(8, 4)),
    "two results": lambda: Calls(lambda x, a, b: torch.stack([y := a(x), b(y)]).sum(0), conv(5, 8, 1), conv(8, 8, 1)),
    "channels last inside": lambda: Calls(
        lambda x, a, n, b, c: a(x) + c(b(n(a(x).permute(0, 2, 3, 1))).relu()).permute(0, 3, 1, 2),
        conv(5, 8, 7, padding=3),
        nn.LayerNorm(8),
        nn.Linear(8, 16),
        nn.Linear(16, 8),
    ),
    "in place": lambda: nn.Sequential(conv(5, 8, 1), nn.ReLU(inplace=True), conv(8, 8, 1), nn.SiLU(inplace=True)),
}


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_images(name: str, density: float) -> None:
    torch.manual_seed(0)
    model = thin(IMAGES[name](), density)
    others = tuple(torch.randn(n, 5, 9, 11) for n in (1, 3))
    others += (torch.randn(2, 5, 11, 9).transpose(2, 3), torch.randn(2, 5, 9, 11).to(memory_format=torch.channels_last))
    others += (torch.randn(2, 10, 9, 22)[:, ::2, :, ::2],)
    assert_lowered(model, torch.randn(2, 5, 9, 11), others=others, segments=None)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 17), (16, 16), (40, 33)])
def test_other_sizes_than_lowered_for(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layers = (conv(3, 8, 7, stride=2, padding=3), nn.ReLU(), conv(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert_lowered(thin(nn.Sequential(*layers, nn.Linear(8, 3))), torch.randn(1, 3, 20, 20), others=(torch.randn(2, 3, *size),))


def test_sizes_that_the_kernels_do_not_take_run_in_torch() -> None:
    torch.manual_seed(0)
    model = thin(nn.Sequential(conv(3, 8, 1), nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(8 * 49, 3)))
    lowered = assert_lowered(model, torch.randn(2, 3, 7, 7))
    x = torch.randn(2, 3, 12, 12)
    assert plans(lowered, x) == ["an adaptive pooling has windows of several sizes"]
    with torch.no_grad():
        assert torch.allclose(model(x), lowered(x), atol=1e-5)


SEQUENCES = {
    "linear": lambda: nn.Sequential(nn.Linear(12, 20)),
    "feed forward": lambda: nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 48), nn.GELU(), nn.Dropout(), nn.Linear(48, 12)),
    "a residual": lambda: Calls(lambda x, n, a: a(n(x)) + x, nn.LayerNorm(12), nn.Linear(12, 12)),
    "three readers": lambda: Calls(lambda x, a, b, c: a(x) * b(x) + c(x), *(nn.Linear(12, 12) for _ in range(3))),
}


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_sequences(name: str, density: float) -> None:
    torch.manual_seed(0)
    others = tuple(torch.randn(shape) for shape in [(1, 37, 12), (3, 5, 12), (4, 1, 12), (1, 1, 12), (2, 130, 12)])
    assert_lowered(thin(SEQUENCES[name](), density), torch.randn(2, 40, 12), others=others, segments=None)
    rows = tuple(torch.randn(n, 12) for n in (1, 2, 9, 64))
    assert_lowered(thin(SEQUENCES[name](), density), torch.randn(7, 12), others=rows, segments=None)


def test_signals_of_one_dimension() -> None:
    torch.manual_seed(0)
    layers = (nn.Conv1d(5, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 5, stride=2, padding=2, dilation=2))
    assert_lowered(thin(nn.Sequential(*layers)), torch.randn(2, 5, 33), others=(torch.randn(1, 5, 64),))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(value: float) -> None:
    torch.manual_seed(0)
    layers = (conv(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), conv(8, 4, 3, padding=1, groups=4))
    x = torch.randn(2, 3, 12, 12)
    x[0, 0, 5, 5] = value
    model = thin(nn.Sequential(*layers), 1.0)
    lowered = lower(model, x, backend="native")
    with torch.no_grad():
        expected, got = model(x), lowered(x)
    assert torch.equal(expected.isfinite(), got.isfinite())
    assert torch.equal(expected.isnan(), got.isnan())


@settings(max_examples=40, deadline=None)
@drawn(data=st.data())
def test_any_convolution(data: st.DataObject) -> None:
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    groups = data.draw(st.sampled_from([1, 1, 2, 3]))
    kernel, dilation = (draw(1, 5), draw(1, 5)), (draw(1, 3), draw(1, 3))
    size = tuple(draw(1, 40) + d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
    options = {"stride": (draw(1, 3), draw(1, 3)), "padding": (draw(0, 4), draw(0, 4)), "dilation": dilation, "groups": groups}
    model = nn.Sequential(nn.Conv2d(groups * draw(1, 20), groups * draw(1, 20), kernel, bias=draw(0, 1) == 1, **options))
    torch.manual_seed(draw(0, 99))
    assert_lowered(thin(model, data.draw(st.floats(0, 1))), torch.randn(draw(1, 3), model[0].in_channels, *size))


@settings(max_examples=40, deadline=None)
@drawn(st.integers(1, 70), st.integers(1, 70), st.integers(1, 3), st.integers(1, 70), st.floats(0, 1))
def test_any_linear_layer(ins: int, outs: int, batch: int, tokens: int, density: float) -> None:
    assert_lowered(thin(nn.Sequential(nn.Linear(ins, outs)), density), torch.randn(batch, tokens, ins))


def small() -> nn.Module:
    torch.manual_seed(0)
    layers = (conv(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 16, 3, padding=1), nn.GELU())
    return thin(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)))


X = torch.randn(5, 3, 20, 20, generator=torch.Generator().manual_seed(0))


def test_wide_layers_are_cut_into_blocks_and_chunks() -> None:
    torch.manual_seed(0)
    model = thin(nn.Sequential(conv(300, 260, 3, padding=1), nn.ReLU(), conv(260, 301, 1)), 0.1)
    assert_lowered(model, torch.randn(1, 300, 30, 30), others=(torch.randn(3, 300, 7, 7),))


def test_rows_of_any_rank() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    lowered, x = lower(sparsify(model, 0.1).eval(), (4, 64), backend="native"), torch.randn(2, 3, 5, 64)
    assert lowered(x).shape == (2, 3, 5, 8)
    torch.testing.assert_close(lowered(x), lowered(x.flatten(0, 2)).view(2, 3, 5, 8))


OTHERS = {  # what a model that was lowered for (1, 5, 9, 11) is given
    "no batch": torch.rand(5, 9, 11),
    "too many channels": torch.rand(1, 7, 9, 11),
    "a channel": torch.rand(1, 1, 9, 11),
    "whole numbers": torch.zeros(1, 5, 9, 11, dtype=torch.uint8),
}


@pytest.mark.parametrize("case", OTHERS)
def test_inputs_of_another_kind_are_refused(case: str) -> None:
    lowered = lower(thin(IMAGES["stem"](), 0.4), torch.randn(1, 5, 9, 11), backend="native")
    with pytest.raises(ValueError, match=r"takes floating numbers in 4 dimensions, 5 along dimension 1, and was given"):
        lowered(OTHERS[case])
    with pytest.raises(ValueError, match="does not run on these inputs"):
        lower(thin(IMAGES["stem"](), 0.4), torch.randn(1, 7, 9, 11))
    dense = lower(thin(IMAGES["stem"](), 0.4), torch.randn(1, 5, 9, 11), backend="torch")
    assert flop_report(lowered, (1, 5, 9, 11)).dense_macs == flop_report(dense, (1, 5, 9, 11)).dense_macs > 0
    for use in (sparsify, lower, speed_report):
        with pytest.raises(ValueError, match=r"takes a model as it was before lower\(\)"):
            use(lowered, 0.1 if use is sparsify else (1, 5, 9, 11))
    assert not any(module.training for module in lowered.modules())


def test_many_shapes_do_not_keep_many_plans() -> None:
    lowered = lower(small(), X, backend="native")
    segment = next(m for m in lowered.modules() if isinstance(m, Segment))
    with torch.no_grad():
        for side in range(10, 20):
            lowered(torch.randn(1, 3, side, side))
    assert len(_PLANS[segment.values]) == 4


def test_changed_weights_are_seen() -> None:
    model, lowered = small(), lower(small(), X, backend="native")
    segment = next(m for m in lowered.modules() if isinstance(m, Segment))
    with torch.no_grad():
        lowered(X)
        segment.values.mul_(0)
        assert lowered(X).abs().max() == 0
        lowered.load_state_dict(lower(small(), X, backend="native").state_dict())
        assert torch.allclose(lowered(X), model(X), atol=1e-5)


def test_threads_run_one_model_at_once() -> None:
    model, lowered = small(), lower(small(), X, backend="native")
    inputs = [torch.randn(1 + i % 3, 3, 20 + i % 2, 20) for i in range(24)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    wrong: list[int] = []

    def work(first: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                wrong.extend(i for i in range(first, 24, 4) if not torch.allclose(lowered(inputs[i]), expected[i], atol=1e-5))

    trained = nn.Sequential(conv(3, 8, 3), nn.Flatten(), nn.Linear(8 * 324, 2))
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(10):  # beside training
        trained(X).square().mean().backward()
        optimizer.step()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("threads", [1, 3])
def test_other_numbers_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_lowered(small(), X, others=(X[:1], X[:4]))
    finally:
        torch.set_num_threads(before)


def test_copies_files_and_pickles() -> None:
    model, lowered = small(), lower(small(), X, backend="native")
    file = io.BytesIO()
    torch.save(lowered, file)
    file.seek(0)
    with torch.no_grad():
        for other in (copy.deepcopy(lowered), torch.load(file, weights_only=False)):
            assert torch.allclose(other(X), model(X), atol=1e-5)


def test_other_formats_run_in_torch() -> None:
    model, lowered = small(), lower(small(), X, backend="native")
    with torch.no_grad():
        assert torch.allclose(lowered.double()(X.double()), model.double()(X.double()), atol=1e-6)
        assert lowered.bfloat16()(X.bfloat16()).dtype is torch.bfloat16


def test_gradients_of_inputs() -> None:
    model, lowered = small(), lower(small(), X, backend="native")
    ours, theirs = X.clone().requires_grad_(), X.clone().requires_grad_()
    lowered(ours).square().sum().backward()
    model(theirs).square().sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)


def test_compile_and_export() -> None:
    model, lowered = small(), lower(small(), X, backend="native")
    with torch.no_grad():
        expected = model(X)
        assert torch.allclose(torch.compile(lowered, fullgraph=True)(X), expected, atol=1e-5)
        batch = torch.export.Dim("batch", min=2, max=64)
        exported = torch.export.export(lowered, (X,), dynamic_shapes=({0: batch},))
        assert "sparsify.run" in str(exported.graph)
        file = io.BytesIO()
        torch.export.save(exported, file)
        file.seek(0)
        assert torch.allclose(torch.export.load(file).module()(X[:3]), expected[:3], atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's own check
def test_operator_obeys_the_rules_of_operators() -> None:
    segment = next(m for m in lower(small(), X, backend="native").modules() if isinstance(m, Segment))
    x = X.clone().requires_grad_()
    torch.library.opcheck(torch.ops.sparsify.run.default, ([x], segment.values, segment.bits, segment.program))


def test_programs_are_text_and_run_in_torch() -> None:
    model = small()
    segment = next(m for m in lower(model, X, backend="native").modules() if isinstance(m, Segment))
    program = Program.from_json(segment.program)
    assert program.to_json() == segment.program
    assert [op.kind for op in program.ops] == ["conv", "conv", "mean", "flatten", "linear"]
    assert [op.activation[0] for op in program.ops] == ["relu", "gelu", "none", "none", "none"]
    with torch.no_grad():
        assert torch.allclose(interpret(program, [X], segment.values, segment.bits)[0], model(X), atol=1e-5)


def test_lowered_weights_take_less_than_half() -> None:
    torch.manual_seed(0)
    model = thin(nn.Sequential(conv(64, 256, 3), nn.ReLU(), conv(256, 64, 3)), 0.1)
    dense = sum(p.nbytes for p in model.parameters())
    lowered = lower(model, torch.randn(1, 64, 16, 16), backend="native")
    kept = sum(b.nbytes for b in lowered.buffers()) + sum(p.nbytes for p in lowered.parameters())
    (plan,) = plans(lowered, torch.randn(1, 64, 16, 16))
    assert isinstance(plan, Plan)
    assert kept < 0.15 * dense
    assert kept + plan.native.nbytes < 0.5 * dense


def resident() -> int:
    """Return the bytes of memory that this process uses."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say what memory a process uses")
@torch.no_grad()
def test_plans_share_the_memory_of_activations() -> None:
    def made() -> nn.Module:
        return lower(nn.Sequential(conv(2, 8, 3), conv(8, 8, 1)).eval(), x, backend="native")

    x = torch.randn(1, 2, 512, 512)  # 19 MB for planes
    models = [made()]
    before = resident()
    models += [made() for _ in range(8)]
    for model in models:
        model(x)
    assert resident() - before < 100e6


@pytest.mark.parametrize(
    ("window", "heights"),
    [
        (Window((3, 3), (1, 1), (1, 1), (1, 1)), [3]),
        (Window((3, 3), (2, 2), (1, 1), (1, 1)), [2, 2, 1, 1]),  # even rows twice, odd ones once, each in two phases of columns
        (Window((1, 1), (2, 2), (0, 0), (1, 1)), [1]),
        (Window((3, 1), (2, 1), (1, 0), (2, 1)), [3]),  # dilation looks at one phase alone
        (Window((7, 7), (1, 1), (4, 4), (1, 1)), [7]),  # more padding than stands around planes
    ],
)
def test_rows_that_a_plane_is_looked_at(window: Window, heights: list[int]) -> None:
    assert window.heights() == heights


# Real networks


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "fcn_resnet50", "convnext_tiny"])
def test_torchvision_models(name: str) -> None:
    model = give_statistics(sparsify(load_model(name, device="cpu").eval(), 0.2, method="static").eval())
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    lowered = lower(model, x, backend="native")
    assert plans(lowered, x)
    assert all(isinstance(plan, Plan) for plan in plans(lowered, x))
    for other in (x, x[:1], torch.randn(3, 3, 96, 80)):
        with torch.no_grad():
            expected, got = model(other), lowered(other)
        expected, got = (y if isinstance(y, Tensor) else y["out"] for y in (expected, got))
        assert (expected - got).abs().max() <= 1e-4 * expected.abs().max()


def test_a_vision_transformer() -> None:
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 128)
    nn.init.normal_(model.heads[0].weight)
    sparse = sparsify(model.eval(), 0.2, method="static").eval()
    x = torch.randn(2, 3, 32, 32)
    lowered = lower(sparse, x, backend="native")
    with torch.no_grad():
        assert torch.allclose(lowered(x), sparse(x), atol=1e-4)
    left = [m for m in lowered.modules() if isinstance(m, (nn.Linear, nn.MultiheadAttention))]
    assert not left  # the layers inside attentions run on the kernels too


def test_layers_that_python_code_calls() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50}
    model = sparsify(BertModel(BertConfig(**sizes)).eval(), 0.2, method="static").eval()
    tokens = torch.randint(0, 50, (2, 12))
    lowered = lower(model, tokens, backend="native")
    with torch.no_grad():
        for given in (tokens, torch.randint(0, 50, (3, 7))):
            assert torch.allclose(lowered(given).last_hidden_state, model(given).last_hidden_state, atol=1e-5)
    assert sum(isinstance(m, Segment) for m in lowered.modules()) >= 2 * 5


def test_what_is_overwritten_is_read_before() -> None:
    def call(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
        y = a(x)
        before = b(y)
        y.relu_()
        return before + b(y)

    torch.manual_seed(0)
    model = thin(Calls(call, conv(5, 5, 1), conv(5, 5, 1)), 1.0)
    x = torch.randn(1, 5, 8, 8)
    with torch.no_grad():
        assert torch.allclose(lower(model, x, backend="native")(x), model(x), atol=1e-5)


# Which kernel, and how fast


def test_kernels_are_chosen_by_density() -> None:
    some = "shared" if lanes() == 16 else "sparse"  # sixteen numbers cross lines of the cache: what is read once is worth more
    for density, kernel in ((0.1, "sparse"), (0.2, "sparse"), (0.4, some), (0.9, "shared"), (1.0, "shared")):
        torch.manual_seed(0)
        x = torch.randn(1, 64, 20, 20)
        (plan,) = plans(assert_lowered(thin(nn.Sequential(conv(64, 64, 3)), density), x), x)
        assert isinstance(plan, Plan)
        assert [choice.kernel for choice in plan.choices] == [kernel]
        assert plan.choices[0].density == pytest.approx(density, abs=0.02)


@pytest.mark.parametrize("backend", ["auto", "measured"])
def test_layers_stay_where_torch_is_faster(backend: str) -> None:
    torch.manual_seed(0)
    tiny, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(1, 4)
    lowered = lower(tiny, x, backend=backend)
    assert isinstance(lowered[0], nn.Linear)
    assert "of the time" in left_in_torch(lowered)["0"]
    wide = thin(nn.Sequential(conv(256, 256, 3, padding=1)), 0.05)
    assert len(plans(lower(wide, torch.randn(1, 256, 28, 28), backend=backend), torch.randn(1, 256, 28, 28))) == 1


def test_speed_report(tmp_path: Path) -> None:
    said: list[str] = []
    model = sparsify(small(), 0.3, method="static").eval()
    report = speed_report(model, X, repeats=2, backend="native", progress=said.append)
    assert [layer.name for layer in report.layers] == ["_0", "_3", "_7"]
    assert all(layer.measured > 0 and layer.predicted > 0 for layer in report.layers)
    assert report.speedup == report.dense_ms / report.sparse_ms > 0
    assert said[0] == "lowering"
    assert "round 2 of 2" in said
    assert f"{report.speedup:.2f} times faster" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["layers"][1]["measured"] == report.layers[1].measured
    report.plot(str(tmp_path / "speed.svg"))
    assert "times faster than dense" in (tmp_path / "speed.svg").read_text()
    torch_only = speed_report(model, X, repeats=1, backend="torch")
    assert {layer.kernel for layer in torch_only.layers} == {"torch"}
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        speed_report(model, X, repeats=0)


def test_speed_report_of_training() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 96, 3, padding=1), nn.ReLU(), nn.Conv2d(96, 96, 3, padding=1), nn.Flatten(), nn.Linear(96 * 64, 10)]
    model = sparsify(nn.Sequential(*layers), {"0.*": 1.0, "*": 0.05}, method="static", kernels="auto")
    report = speed_report(model, (16, 3, 8, 8), training=True, repeats=2)
    found = {layer.name: (layer.kernel, layer.reason) for layer in report.layers}
    assert found["0"] == ("masked", "sums over kept weights would not be faster")
    assert found["2"] == ("sparse", "few weights are kept")
    assert all(layer.measured > 0 and layer.predicted > 0 for layer in report.layers)
    assert f"training step: dense {report.dense_ms:.2f} ms" in str(report)
    use_kernels(model, "masked")
    assert {x.reason for x in speed_report(model, (2, 3, 8, 8), training=True, repeats=1).layers} == {"kernels='masked'"}
    assert model[0].weight.grad is None
    with pytest.raises(ValueError, match="takes the model that sparsify"):
        speed_report(nn.Sequential(nn.Linear(2, 2)), (1, 2), training=True)


def test_bench_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "speed.json"
    arguments = ["bench", "squeezenet1_1", "--density", "0.1", "--input", "1x3x64x64", "--repeats", "1", "--json", str(file)]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr()
    assert "times faster" in shown.out
    assert "round 1 of 1" in shown.err
    assert json.loads(file.read_text())["threads"] == torch.get_num_threads()
    assert cli.main([*arguments, "--training", "--kernels", "sparse"]) == 0
    assert "training step: dense" in capsys.readouterr().out
    assert {layer["kernel"] for layer in json.loads(file.read_text())["layers"]} == {"sparse"}
    assert cli.main(["bench", "squeezenet1_1", "--density", "2"]) == 1
    with pytest.raises(SystemExit):
        cli.main(["bench", "squeezenet1_1"])


def test_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"Unknown backend 'fast'. Choose one of: auto, measured, native, torch"):
        lower(small(), X, backend="fast")


def test_without_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lowered = small(), lower(small(), X, backend="native")
    monkeypatch.setattr("passes.lowering.run.native", lambda: None)
    x = torch.randn(2, 3, 31, 31)  # of no plan that is there
    assert plans(lowered, x) == ["there is no native library"]
    with torch.no_grad():
        assert torch.allclose(lowered(x), model(x), atol=1e-5)
    assert not plans(lower(small(), X), X)  # nothing is lowered then
