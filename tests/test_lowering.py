"""Lowered models compute what the dense ones do, with fewer channels."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SMALLEST, WHOLE, SmallNet, input_shape, size
from torch import Tensor, nn

from sparsify import SRigL, flop_report, fold, graphs, lower, sparsify
from sparsify.cli import load_model

X = torch.randn(2, 3, 8, 8)


def give_statistics(model: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms as training leaves them, and not as they begin."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, -0.1, 0.3, generator=generator)
    return model


@torch.no_grad()
def ablate(model: nn.Module, share: float, seed: int = 0) -> nn.Module:
    """Empty a share of the outputs of every convolution, and of the inputs of others."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            module.weight[torch.rand(module.weight.shape[0], generator=generator) < share] = 0
            module.weight[:, torch.rand(module.weight.shape[1], generator=generator) < share / 2] = 0
    return model


def assert_same(model: nn.Module, lowered: nn.Module, *inputs: Tensor) -> None:
    with torch.no_grad():
        expected, got = model.eval()(*inputs), lowered(*inputs)
    expected, got = (x if isinstance(x, Tensor) else x["out"] for x in (expected, got))
    assert (expected - got).abs().max() <= 1e-4 * expected.abs().max()


# By hand: what goes, and what stays


def conv(
    ins: int, outs: int, *, empty: tuple[int, ...] = (), unread: tuple[int, ...] = (), bias: float = 0.0, **more: int
) -> nn.Conv2d:
    layer = nn.Conv2d(ins, outs, 3, **{"padding": 1, **more})
    with torch.no_grad():
        layer.weight[list(empty)] = 0
        layer.weight[:, list(unread)] = 0
        layer.bias.fill_(bias)
    return layer


class Residual(nn.Module):
    """Two branches that are added: a channel goes where both are dead."""

    def __init__(self, empty: tuple[int, ...], other: tuple[int, ...]) -> None:
        super().__init__()
        self.stem, self.branch, self.head = conv(3, 8, empty=empty), conv(8, 8, empty=other), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(x + self.branch(x).relu())


class Joined(nn.Module):
    """A concatenation, pooling, a flattened classifier and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 4, empty=(1,)), conv(3, 6, empty=(0, 5))
        self.gate, self.fc = nn.Conv2d(10, 10, 1), nn.Linear(10 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(torch.cat([self.a(x), self.b(x)], 1))
        x = F.adaptive_avg_pool2d(x, 4)
        x = x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        return self.fc(torch.flatten(x, 1))


class Depthwise(nn.Module):
    """A depthwise convolution between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depth, self.project = conv(3, 8, empty=(2,)), conv(8, 8, groups=8, empty=(5,)), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.depth(self.expand(x).relu()).relu())


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {  # and the outputs that are left
    "no incoming weight": (lambda: nn.Sequential(conv(3, 8, empty=(2, 3)), nn.ReLU(), conv(8, 4)), {"0": 6, "2": 4}),
    "no outgoing weight": (lambda: nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4, unread=(0,))), {"0": 7, "2": 4}),
    "both": (lambda: nn.Sequential(conv(3, 8, empty=(1,)), nn.ReLU(), conv(8, 4, unread=(1, 6))), {"0": 6, "2": 4}),
    "a chain": (
        lambda: nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6, empty=(0,)), conv(6, 4, unread=(1,))),
        {"0": 8, "2": 4},
    ),
    "a number behind padding stays": (lambda: nn.Sequential(conv(3, 8, empty=(2,), bias=0.5), conv(8, 4)), {"0": 8}),
    "a number without padding goes": (
        lambda: nn.Sequential(conv(3, 8, empty=(2,), bias=0.5), nn.ReLU(), conv(8, 4, padding=0)),
        {"0": 7},
    ),
    "a negative number behind ReLU goes": (
        lambda: nn.Sequential(conv(3, 8, empty=(2,), bias=-0.5), nn.ReLU(), conv(8, 4)),
        {"0": 7},
    ),
    "outputs stay": (lambda: nn.Sequential(conv(3, 8, empty=(2,))), {"0": 8}),
    "one stays": (lambda: nn.Sequential(conv(3, 4, empty=(0, 1, 2, 3)), nn.ReLU(), conv(4, 2)), {"0": 1}),
    "grouped stays": (lambda: nn.Sequential(conv(3, 8, empty=(2,)), conv(8, 8, groups=2), conv(8, 4)), {"0": 8, "1": 8}),
    "a residual": (lambda: Residual((1, 2), (2, 3)), {"stem": 7, "branch": 7}),
    "a concatenation": (Joined, {"a": 3, "b": 4, "gate": 7}),
    "depthwise": (Depthwise, {"expand": 6, "depth": 6}),
    "hidden units": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.GELU(), nn.Linear(16, 3)), {"1": 16}),
}


@pytest.mark.parametrize("case", CASES)
def test_channels_that_go_and_stay(case: str) -> None:
    make, left = CASES[case]
    model = make().eval()
    before = copy.deepcopy(model.state_dict())
    lowered = lower(model, X, backend="torch")
    assert_same(model, lowered, X)
    assert {name: lowered.get_parameter(f"{name}.weight").shape[0] for name in left} == left
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # a copy was lowered


# Real networks


@pytest.mark.parametrize("name", sorted(n for n in SMALLEST if n in WHOLE and size(n) < 28e6 and "quantized" not in n))
def test_torchvision_models(name: str) -> None:
    model = ablate(give_statistics(load_model(name, device="cpu")), 0.3).eval()
    shape = input_shape(name, small=True)
    x = torch.randn(2, *shape[1:], generator=torch.Generator().manual_seed(0))
    lowered = lower(model, x)
    assert_same(model, lowered, x)
    assert type(lowered).__name__ == type(model).__name__
    assert 0 < flop_report(lowered, tuple(x.shape)).dense_macs <= flop_report(model, tuple(x.shape)).dense_macs


def test_other_sizes_and_memory_formats() -> None:
    model = ablate(give_statistics(load_model("resnet18", device="cpu")), 0.5).eval()
    lowered = lower(model, (1, 3, 64, 64), backend="torch")
    for x in (torch.randn(3, 3, 96, 80), torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)):
        assert_same(model, lowered, x)
    assert not any(isinstance(module, nn.BatchNorm2d) for _, module in called(lowered))


def called(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(str(n.target), model.get_submodule(str(n.target))) for n in graphs(model)[""].nodes if n.op == "call_module"]


def test_a_masked_model_is_folded_first() -> None:
    sparse = sparsify(give_statistics(SmallNet()), 0.05, method="static", seed=1).eval()
    lowered = lower(sparse, X, backend="torch")
    assert_same(fold(sparse), lowered, X)
    assert not any("mask" in name for name in lowered.state_dict())


def test_ablated_neurons_of_srigl_go() -> None:
    model = sparsify(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8)), 0.1, method=SRigL(interval=2, ablation=0.8))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.updater.attach(optimizer, total_steps=40)
    for _ in range(40):
        optimizer.zero_grad()
        model(torch.randn(32, 16)).square().mean().backward()
        optimizer.step()
    alive = int(model.updater.masks["0.weight"].any(1).sum())
    assert alive < 64
    lowered = lower(model.eval(), (1, 16), backend="torch")
    unread = int((~model.updater.masks["2.weight"].any(0) & model.updater.masks["0.weight"].any(1)).sum())
    assert lowered[0].out_features == alive - unread
    assert_same(fold(model), lowered, torch.randn(4, 16))


def test_models_in_parts_are_lowered_in_parts() -> None:
    model = ablate(give_statistics(load_model("retinanet_resnet50_fpn", device="cpu")), 0.3).eval()
    model.transform.min_size, model.transform.max_size = (64,), 64
    images = [torch.rand(3, 64, 64)]
    lowered = lower(model, images, backend="torch")
    with torch.no_grad():
        expected, got = model.backbone(torch.rand(1, 3, 64, 64)), lowered.backbone(torch.rand(1, 3, 64, 64))
    assert expected.keys() == got.keys()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(model.backbone(x).values(), lowered.backbone(x).values(), strict=True):
            assert (a - b).abs().max() <= 1e-4 * a.abs().max()


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 0.9), seed=st.integers(0, 99), width=st.integers(1, 9), bias=st.floats(-1, 1))
def test_random_shares(share: float, seed: int, width: int, bias: float) -> None:
    torch.manual_seed(seed)
    body = [
        conv(3, width, bias=bias),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        conv(width, 2 * width, padding=0, bias=bias),
        nn.Hardswish(),
    ]
    model = nn.Sequential(*body, conv(2 * width, 4), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    model = ablate(give_statistics(model, seed), share, seed).eval()
    assert_same(model, lower(model, X), X)


# Bad input


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"in training mode.*eval\(\)"):
        lower(SmallNet(), X)
    with pytest.raises(ValueError, match="Nothing is pruned yet"):
        lower(sparsify(SmallNet(), 0.1, method="gmp").eval(), X)
    with pytest.raises(ValueError, match="meta device"):
        lower(SmallNet().to("meta").eval(), X)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        lower("resnet50", X)


# What channels must not be followed through


class Writes(nn.Module):
    """An activation in place, of a value that something else reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = conv(3, 6, empty=(1,), bias=-0.5, padding=0), conv(6, 4, padding=0), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.act(x)
        return self.b(x) + self.b(y)


def shared() -> nn.Module:
    layer = conv(8, 8, empty=(3,))
    return nn.Sequential(conv(3, 8), nn.ReLU(), layer, nn.ReLU(), layer, nn.ReLU(), conv(8, 2))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), conv(8, 8, empty=(3,)), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 2))
    model[3].weight = model[1].weight
    return model


ODD: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "in place": (Writes, X),
    "a layer used twice": (shared, X),
    "tied weights": (tied, X),
    "without a batch": (lambda: nn.Sequential(conv(3, 8, empty=(2,)), nn.ReLU(), conv(8, 4)), X[0]),
    "float64": (lambda: nn.Sequential(conv(3, 8, empty=(2,)), nn.ReLU(), conv(8, 4)).double(), X.double()),
    "bfloat16": (lambda: nn.Sequential(conv(3, 8, empty=(2,)), nn.ReLU(), conv(8, 4)).bfloat16(), X.bfloat16()),
    "no statistics": (
        lambda: nn.Sequential(conv(3, 8, empty=(2,)), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(), conv(8, 4)),
        X,
    ),
    "layer norm": (lambda: nn.Sequential(conv(3, 8, empty=(2,)), nn.LayerNorm([8, 8, 8]), conv(8, 4)), X),
    "one channel joined with itself": (lambda: Twice(), X),
}


class Twice(nn.Module):
    """A concatenation and a sum of a value with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 4, empty=(1,)), conv(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.b(torch.cat([x, x + x], 1))


@pytest.mark.parametrize("case", ODD)
def test_odd_networks_stay_the_same(case: str) -> None:
    make, x = ODD[case]
    model = make().eval()
    assert_same(model, lower(model, (x,)), x)


class SharesLayers(nn.Module):
    """Python code around two graphs that call the same convolution."""

    def __init__(self) -> None:
        super().__init__()
        layer = conv(3, 4, empty=(1,))
        self.a, self.b = nn.Sequential(layer, nn.BatchNorm2d(4)), nn.Sequential(layer, nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) if x.sum() < 1e9 else x


def test_layers_that_several_graphs_call_stay() -> None:
    model = give_statistics(SharesLayers()).eval()
    lowered = lower(model, X, backend="torch")
    assert list(graphs(lowered)) == ["a", "b"]
    assert_same(model, lowered, X)


def test_python_code_does_not_stand_in_for_graphs_that_were_lowered() -> None:
    model = give_statistics(nn.ModuleDict({"block": nn.Sequential(conv(3, 4), nn.BatchNorm2d(4))}))
    root = ByName(model["block"]).eval()
    lowered = lower(root, X, backend="torch")
    assert_same(root, lowered, X)
    with pytest.raises(ValueError, match="Its Python code cannot stand in"):
        lowered.block(None)


class ByName(nn.Module):
    """Python code that calls a graph by the name of its argument."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(input=x) if x.sum() < 1e9 else x


class Shortcut(nn.Module):
    """Python code that calls a network, and a layer of it besides."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(conv(3, 3), nn.BatchNorm2d(3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            return x
        return self.net(x) + self.net[0](x)


class Reads(Shortcut):
    """Python code that reads a weight of a network that it calls."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            return x
        return self.net(x) + F.conv2d(x, self.net[0].weight, padding=1)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("cls", [Shortcut, Reads])
def test_layers_that_python_code_calls_besides_or_reads_stay(cls: type[nn.Module], backend: str) -> None:
    torch.manual_seed(0)
    model = give_statistics(cls()).eval()
    assert_same(model, lower(model, X, backend=backend), X)
