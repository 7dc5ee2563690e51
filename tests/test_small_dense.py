"""Small-Dense: the narrower network of equal parameter count, on every torchvision classification model."""

import pytest
import torch
import torch.nn.functional as F
from models import LARGE_TO_TRAIN, SMALLEST, SmallNet, input_shape, size, swept, training_loss
from networks import CharGRU, WideResNet22
from torch import Tensor, nn
from torchvision import models

from sparsify import flop_report, fold, small_dense, sparsify
from sparsify.cli import load_model


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


CLASSIFIERS = models.list_models(module=models)


@pytest.mark.parametrize("name", swept(CLASSIFIERS, SMALLEST - {"swin_t", "densenet121"}))
def test_every_classifier_builds_and_trains(name: str) -> None:
    torch.manual_seed(0)
    on_values = name in SMALLEST and size(name) < LARGE_TO_TRAIN
    model = load_model(name, device="cpu" if on_values else "meta")
    small = small_dense(model, 0.1, input_shape(name))
    assert 0.099 * parameters(model) <= parameters(small) <= 0.1 * parameters(model)
    assert type(small).__name__ == type(model).__name__
    if not on_values:
        return
    small.train()
    for weight in small.parameters():
        if not weight.any() and weight.dim() > 1:  # a head that starts at zero would let no gradient through
            nn.init.normal_(weight, std=0.02)
    before = [p.detach().clone() for p in small.parameters()]
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    loss = training_loss(name, small, "cpu")
    assert loss.isfinite()
    loss.backward()
    optimizer.step()
    changed = sum(not torch.equal(a, b) for a, b in zip(before, small.parameters(), strict=True))
    assert changed > len(before) / 2


# The report's Small-Dense rows: WRN-22-2 trains and infers at .20 of dense for .20 of the parameters.
@pytest.mark.parametrize("density", [0.1, 0.2, 0.5])
def test_ratios_of_the_papers_network(density: float) -> None:
    model = WideResNet22()
    small = small_dense(model, density, (1, 3, 32, 32))
    assert parameters(small) / parameters(model) == pytest.approx(density, abs=0.005)
    ratio = flop_report(small, (1, 3, 32, 32)).dense_macs / flop_report(model, (1, 3, 32, 32)).dense_macs
    assert ratio == pytest.approx(density, abs=0.025)


# Not published as numbers; ResNet-50 narrowed to .1 and .2 of its parameters.
@pytest.mark.parametrize(("density", "flops"), [(0.1, 0.0885), (0.2, 0.186)])
def test_ratios_of_resnet50(density: float, flops: float) -> None:
    with torch.device("meta"):
        model = models.resnet50()
    small = small_dense(model, density, (1, 3, 224, 224))
    assert parameters(small) / parameters(model) == pytest.approx(density, abs=0.002)
    ratio = flop_report(small, (1, 3, 224, 224)).dense_macs / flop_report(model, (1, 3, 224, 224)).dense_macs
    assert ratio == pytest.approx(flops, abs=0.003)


MULTILAYER = {
    "three times as many outputs": ((100, 300, 10), [(89, 100), (10, 89)]),
    "as the last layer": ((50, 100, 300), [(29, 50), (300, 29)]),
    "outputs as many as hidden": ((64, 64, 64), [(18, 64), (64, 18)]),
}


@pytest.mark.parametrize(("sizes", "shapes"), MULTILAYER.values(), ids=MULTILAYER)
def test_plain_layers_of_awkward_sizes(sizes: tuple, shapes: list) -> None:
    model = nn.Sequential(nn.Linear(*sizes[:2]), nn.ReLU(), nn.Linear(*sizes[1:]))
    small = small_dense(model, 0.3, (1, sizes[0]))
    assert [tuple(p.shape) for p in small.parameters() if p.dim() == 2] == shapes


def test_the_language_model_shrinks_throughout() -> None:
    model = CharGRU()  # whose first readout is as wide as there are classes
    small = small_dense(model, 0.1, torch.zeros(1, 8, dtype=torch.long))
    # One factor would give 76 to the readout; 80 uses what whole numbers leave of the budget.
    assert (small.gru.hidden_size, small.readout1.out_features, small.head.out_features) == (151, 80, 256)
    assert small.embedding.weight.std().item() == pytest.approx(1.0, abs=0.05)
    with pytest.raises(ValueError, match="takes a dense model"):
        small_dense(sparsify(model, 0.1), 0.5, torch.zeros(1, 8, dtype=torch.long))


class Mixed(nn.Module):
    """A residual, a concatenation, groups, a depthwise layer, heads, a table and a reshape by a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.groups = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(32, 64, 3, padding=1, groups=32)
        self.widening = nn.Conv2d(32, 80, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(176)
        self.merge = nn.Conv2d(176, 48, 1)
        self.attention = nn.MultiheadAttention(48, 4, batch_first=True)
        self.position = nn.Parameter(torch.randn(1, 64, 48))
        self.table = nn.Embedding(7, 48)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.groups(x)
        x = self.merge(self.norm(torch.cat([x, self.depthwise(x), self.widening(x)], 1)))
        tokens = x.reshape(x.shape[0], 48, 64).transpose(1, 2) + self.position
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(tokens.mean(1))


def test_sizes_stay_consistent() -> None:
    torch.manual_seed(0)
    model = Mixed()
    small = small_dense(model, 0.3, (1, 3, 8, 8))
    width, merged = small.stem.out_channels, small.merge.out_channels
    assert small.groups.in_channels == small.groups.out_channels == width < 32
    assert small.depthwise.groups == width
    assert small.depthwise.out_channels == 2 * width
    assert small.widening.groups == 8
    assert small.norm.num_features == small.merge.in_channels == 3 * width + small.widening.out_channels
    assert merged % 4 == 0
    assert small.attention.embed_dim == small.position.shape[2] == small.head.in_features == merged
    assert small.head.out_features == 10
    assert model.stem.out_channels == 32  # the original is not touched
    x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 10
    optimizer = torch.optim.Adam(small.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(small(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle, self.head = nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(64, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.embedding(x)))


def test_tied_weights_stay_tied_and_count_once() -> None:
    small = small_dense(Tied(), 0.5, torch.zeros(1, 4, dtype=torch.long))
    assert small.head.weight is small.embedding.weight
    assert parameters(small) <= 0.5 * parameters(Tied()) < parameters(small) * 1.05


class Characters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.gru = nn.Embedding(50, 128), nn.GRU(128, 512, batch_first=True)
        self.head = nn.Linear(512, 50)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.embedding(x))[0])


def test_recurrent_networks() -> None:
    model = Characters()
    small = small_dense(model, 0.2, torch.zeros(1, 4, dtype=torch.long))
    assert parameters(small) / parameters(model) == pytest.approx(0.2, abs=0.01)
    assert small(torch.zeros(2, 4, dtype=torch.long)).shape == (2, 4, 50)


def test_a_small_dense_network_can_be_made_sparse() -> None:
    small = small_dense(SmallNet(), 0.5, (1, 3, 8, 8))
    sparse = sparsify(small, 0.5)
    x = torch.randn(1, 3, 8, 8)
    plain = fold(sparse.eval())
    assert torch.equal(plain(x), sparse(x))
    assert list(plain.state_dict()) == list(SmallNet().state_dict())


def test_a_narrowed_model_keeps_its_graph_when_folded() -> None:
    """Mixed reshapes to 48 channels in its own forward; the narrowed one must not."""
    sparse = sparsify(small_dense(Mixed(), 0.3, (1, 3, 8, 8)), 0.5, include=["position"]).eval()
    x = torch.randn(2, 3, 8, 8)
    plain = fold(sparse)
    assert torch.equal(plain(x), sparse(x))
    assert not any("mask" in name for name in plain.state_dict())


def test_activations_keep_their_scale() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 1000), nn.Linear(1000, 1000), nn.Linear(1000, 10))
    small = small_dense(model, 0.1, (1, 100))
    x = torch.randn(64, 100)
    assert small[:2](x).std().item() == pytest.approx(model[:2](x).std().item(), rel=0.1)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else x


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 16)
        self.bilinear = nn.Bilinear(16, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(self.fc(x), self.fc(x))


BAD = {
    "density": (SmallNet, 0.0, (1, 3, 8, 8), r"must be a number in \(0, 1\]"),
    "too low": (SmallNet, 1e-6, (1, 3, 8, 8), "is too low"),
    "untraceable": (Branches, 0.5, (1, 4), "does not trace whole"),
    "unknown layer": (Strange, 0.5, (1, 4), "Node 'bilinear' .* there is no rule for a Bilinear"),
    "keywords": (SmallNet, 0.5, {"x": torch.zeros(1, 3, 8, 8)}, "positional"),
}


@pytest.mark.parametrize(("model", "density", "inputs", "message"), BAD.values(), ids=BAD)
def test_bad_input(model: type[nn.Module], density: float, inputs: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_dense(model(), density, inputs)
