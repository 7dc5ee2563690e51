"""Models that do not trace whole: torchvision's detectors and flow networks, torch.nn's recurrent layers and transformers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from behaviour import TOKENS, assert_same_outputs, assert_trains, half_of_torch_count, outputs
from models import PARTS
from torch import Tensor, nn

from sparsify import flop_report, fold, graphs, sparsify
from sparsify.cli import load_model

ROUNDING = 2e-6  # torch.nn's recurrent and transformer kernels round otherwise for weights that require no gradient


# torchvision's detectors and flow networks


@pytest.mark.parametrize("name", PARTS)
def test_every_weight_of_a_model_in_parts_is_masked(name: str) -> None:
    sparse = sparsify(load_model(name), density=0.1)
    assert not sparse.updater.rules
    assert len(graphs(sparse)) > 1
    assert sum(sparse.updater.nonzeros.values()) < 0.11 * sum(p.numel() for p in sparse.parameters())


def detection_targets() -> list[dict[str, Tensor]]:
    return [{"boxes": torch.tensor([[10.0, 10.0, 90.0, 90.0]]), "labels": torch.tensor([1])} for _ in range(2)]


@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_detector_is_the_original_trains_and_is_counted(name: str) -> None:
    model = load_model(name, device="cpu")
    images = list(torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(0)))
    assert_same_outputs(model, (images,), modes=(False,))
    assert_same_outputs(model, (images, detection_targets()), modes=(True,))
    report = flop_report(model, images)
    assert report.measured
    assert "measured:" in str(report)
    assert report.dense_macs == half_of_torch_count(model, (images,))
    sparse = sparsify(model, density=0.5)
    assert set(flop_report(sparse, images).coverage.values()) == {"masked"}
    sum(sparse.train()(images, detection_targets()).values()).backward()
    for weight, mask in sparse.updater.masks.items():
        gradient = sparse.get_parameter(weight).grad
        assert gradient is None or not gradient[~mask].any()
    with pytest.raises(ValueError, match=r"depends on data.*Give example inputs"):
        flop_report(model, [torch.empty(3, 160, 160, device="meta")])


# torch.nn's own recurrent layers and transformers


class CharModel(nn.Module):
    """A character-level language model."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 8)
        self.rnn = kind(8, 16, num_layers=2, batch_first=True, **options)
        width = (options.get("proj_size") or 16) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(tokens))[0])


def next_token_loss(logits: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(
    ("kind", "options", "gates"),
    [
        (nn.GRU, {}, 3),
        (nn.GRU, {"bidirectional": True}, 3),
        (nn.LSTM, {}, 4),
        (nn.LSTM, {"proj_size": 4}, 4),
        (nn.LSTM, {"bidirectional": True, "proj_size": 4}, 4),
        (nn.RNN, {}, 1),
    ],
)
def test_recurrent_layers(kind: type[nn.RNNBase], options: dict[str, Any], gates: int) -> None:
    model = CharModel(kind, **options)
    assert_same_outputs(model, (TOKENS,), atol=ROUNDING)
    assert_trains(model, (TOKENS,), next_token_loss)
    sparse = sparsify(model, density=0.2)
    assert isinstance(sparse.rnn, kind)
    assert not sparse.updater.rules
    directions, out = (2 if options.get("bidirectional") else 1), options.get("proj_size") or 16
    projection = 16 * out if "proj_size" in options else 0
    cells = sum(gates * 16 * (inputs + out) + projection for inputs in (8, directions * out))
    assert flop_report(sparse, (TOKENS,)).dense_macs == TOKENS.numel() * (directions * cells + directions * out * 64)
    flat = copy.deepcopy(sparse)
    flat.rnn.flatten_parameters()
    assert flat.rnn._flat_weights[0] is flat.rnn.weight_ih_l0
    plain = fold(sparse)
    assert type(plain.rnn) is kind
    expected, got = outputs(plain, (TOKENS,), False), outputs(flat, (TOKENS,), False)
    torch.testing.assert_close(got, expected, rtol=0, atol=ROUNDING)


VECTORS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
COMPOSITES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # model, arguments, masked weights
    "transformer": (lambda: nn.Transformer(16, 2, 2, 2, 32, batch_first=True), 2, 20),
    "encoder": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2), 1, 8),
    "layer": (lambda: nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 3)), 1, 5),
    "attention": (lambda: nn.MultiheadAttention(16, 2), 3, 2),
    "attention-qkv": (lambda: nn.MultiheadAttention(16, 2, kdim=16, vdim=16), 3, 2),
    "gru": (lambda: nn.GRU(16, 4), 1, 2),
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_torch_modules_use_their_weights_masked_on_every_path(name: str) -> None:
    make, arguments, masked = COMPOSITES[name]
    model, inputs = make(), (VECTORS,) * arguments
    assert_same_outputs(model, inputs, atol=ROUNDING)
    sparse = sparsify(model, density=0.2)
    assert len(sparse.updater.masks) == masked
    assert not sparse.updater.rules
    expected = outputs(sparse, inputs, False)[0]
    with torch.no_grad():  # what an averaged copy holds at dropped positions must not be seen, not by fast paths either
        for weight, mask in sparse.updater.masks.items():
            sparse.get_parameter(weight).add_(torch.randn(mask.shape) * ~mask)
    with pytest.warns(UserWarning, match="Dropped weights were written to"):
        assert torch.equal(outputs(sparse, inputs, False)[0], expected)
