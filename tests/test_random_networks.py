"""Random small networks: whatever they are built of, every weight is found, counted and used."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from passes import find_sites, trace
from sparsify import flop_report, sparsify
from sparsify.density.distributions import DISTRIBUTIONS, kept

WIDTH = 8
KINDS = (
    "conv grouped depthwise transposed functional standardised residual shared again linear matmul einsum attention dropout"
).split()


class RandomNet(nn.Module):
    """A chain of blocks on images of WIDTH channels, chosen by name."""

    def __init__(self, kinds: list[str]) -> None:
        super().__init__()
        self.kinds = kinds
        self.shared = nn.Conv2d(WIDTH, WIDTH, 1)
        self.layers = nn.ModuleList(self._layer(kind) for kind in kinds)
        self.head = nn.Linear(WIDTH, 3)
        shapes = {"functional": (WIDTH, WIDTH, 3, 3), "standardised": (WIDTH, WIDTH, 1, 1)}
        square = (WIDTH, WIDTH)
        used = ("functional", "standardised", "linear", "matmul", "einsum")
        self.weights = nn.ParameterDict(
            {str(i): torch.randn(shapes.get(k, square)) / 8 for i, k in enumerate(kinds) if k in used}
        )

    def _layer(self, kind: str) -> nn.Module:
        groups = {"grouped": 2, "depthwise": WIDTH}.get(kind, 1)
        if kind in ("conv", "grouped", "depthwise", "residual"):
            return nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=groups), nn.BatchNorm2d(WIDTH), nn.ReLU())
        if kind == "transposed":
            return nn.ConvTranspose2d(WIDTH, WIDTH, 3, padding=1, groups=2)
        if kind == "attention":
            return nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        return nn.Dropout(0.5) if kind == "dropout" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for i, (kind, layer) in enumerate(zip(self.kinds, self.layers, strict=True)):
            x = self._apply(kind, layer, self.weights.get(str(i)), x)
        return self.head(x.mean((2, 3)))

    def _apply(self, kind: str, layer: nn.Module, weight: Tensor | None, x: Tensor) -> Tensor:
        if kind == "residual":
            return x + layer(x)
        if kind == "shared":
            return self.shared(x)
        if kind == "again":
            return self.shared(self.shared(x)) + x
        if kind == "attention":
            tokens = x.flatten(2).transpose(1, 2)
            return (tokens + layer(tokens, tokens, tokens)[0]).transpose(1, 2).view_as(x)
        if weight is None:
            return layer(x)
        if kind == "functional":
            return F.conv2d(x, weight, padding=1).relu()
        if kind == "standardised":
            return F.conv2d(x, (weight - weight.mean((1, 2, 3), keepdim=True)) * WIDTH**-0.5)
        if kind == "linear":
            return F.linear(x.permute(0, 2, 3, 1), weight.t()).permute(0, 3, 1, 2)
        if kind == "matmul":
            return (x.permute(0, 2, 3, 1) @ weight).permute(0, 3, 1, 2)
        return torch.einsum("bchw,oc->bohw", x, weight)


@settings(max_examples=30, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(KINDS), max_size=6),
    density=st.floats(0.01, 1.0),
    distribution=st.sampled_from(["er", "erk", "uniform"]),
    size=st.integers(3, 9),
)
def test_every_weight_of_a_random_network(kinds: list[str], density: float, distribution: str, size: int) -> None:
    torch.manual_seed(0)
    model, x = RandomNet(["conv", *kinds]), torch.randn(2, WIDTH, size, size)
    used = [p for name, p in model.named_parameters() if p.dim() >= 2]
    used = [p for p in used if p is not model.shared.weight or {"shared", "again"} & set(kinds)]
    sparse = sparsify(model, density, distribution, inputs=x)

    # Every weight is masked, and the counts are those of the distribution, rounded once.
    counts = sparse.updater.nonzeros
    assert len(counts) == len(used) - (distribution == "uniform")
    assert counts == {name: int(mask.sum()) for name, mask in sparse.updater.masks.items()}
    for name, share in DISTRIBUTIONS[distribution](find_sites(model, trace(model)), density).items():
        assert counts[name] == kept(share, model.get_parameter(name).numel())

    # MACs are those of a run, and masked ones scale with the density.
    report = flop_report(sparse, x)
    with FlopCounterMode(display=False) as counter:
        model.eval()(x)
    assert report.dense_macs == counter.get_total_flops() // 2
    for layer in report.layers:
        assert layer.sparse_macs == layer.dense_macs * layer.nonzeros // max(layer.params, 1) or not layer.params

    # At density 1 the network is the one it was made from.
    same = sparsify(model, 1.0)
    for training in (True, False):
        torch.manual_seed(1)
        expected = model.train(training)(x)
        torch.manual_seed(1)
        assert torch.equal(same.train(training)(x), expected)
        model.load_state_dict({k: v for k, v in same.state_dict().items() if k in model.state_dict()})
