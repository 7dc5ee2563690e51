"""Models that do not trace whole, and libraries that were not written for fx: found in the libraries, not listed by hand."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from models import PARTS
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from sparsify import RigL, flop_report, fold, graphs, sparsify
from sparsify.cli import load_model

ROUNDING = 2e-6  # torch.nn's recurrent and transformer kernels round otherwise for weights that require no gradient
TOKENS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def outputs(model: nn.Module, inputs: dict[str, Any] | tuple[Any, ...], training: bool) -> list[Tensor]:
    torch.manual_seed(0)
    model.train(training)
    with torch.no_grad():
        result = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    result = dict(result) if isinstance(result, dict) else result
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


def assert_same_outputs(
    model: nn.Module, inputs: Any, modes: tuple[bool, ...] = (True, False), atol: float = 0.0
) -> None:
    original, sparse = copy.deepcopy(model), sparsify(model, density=1.0)
    for training in modes:
        expected, got = outputs(original, inputs, training), outputs(sparse, inputs, training)
        assert len(expected) == len(got) > 0
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=atol, equal_nan=True)


def assert_trains(model: nn.Module, inputs: Any, loss_of: Callable[[Any], Tensor], steps: int = 24) -> None:
    """Train with updates: the loss falls, dropped weights are 0 after every step, and counts stay."""
    sparse = sparsify(model.train(), density=0.3, method=RigL(interval=5))
    counts, before = sparse.updater.nonzeros, {n: m.clone() for n, m in sparse.updater.masks.items()}
    optimizer = torch.optim.AdamW(sparse.parameters(), 5e-3)
    sparse.updater.attach(optimizer, total_steps=steps)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(sparse(**inputs) if isinstance(inputs, dict) else sparse(*inputs))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert all(not sparse.get_parameter(n)[~mask].any() for n, mask in sparse.updater.masks.items())
    assert losses[-1] < losses[0]
    assert sparse.updater.nonzeros == counts
    assert {n: int(m.sum()) for n, m in sparse.updater.masks.items()} == counts
    assert any(not torch.equal(before[n], m) for n, m in sparse.updater.masks.items())


def half_of_torch_count(model: nn.Module, inputs: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        model.eval()(*inputs)
    return counter.get_total_flops() // 2


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
    assert torch.equal(outputs(sparse, inputs, False)[0], expected)


# transformers


def text_model(name: str, **options: Any) -> nn.Module:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.AutoConfig.for_model(name, **small, vocab_size=64, bos_token_id=0, eos_token_id=0, **options)
    auto = {
        "bert": transformers.AutoModelForMaskedLM,
        "t5": transformers.AutoModelForSeq2SeqLM,
    }.get(name, transformers.AutoModelForCausalLM)
    return auto.from_config(config)


T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "decoder_start_token_id": 0}
TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2}),
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "t5": ("t5", T5),
    "mamba": ("mamba", {"state_size": 8}),
}


def multiplying_weights(model: nn.Module) -> set[str]:
    """By their modules: linear, convolutional, and the Conv1D of transformers; a tied weight by its first name."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, transformers.pytorch_utils.Conv1D)
    weights = {m.weight for m in model.modules() if isinstance(m, kinds)}
    return {name for name, p in model.named_parameters() if p in weights}


@pytest.mark.parametrize("name", TEXT)
def test_language_model(name: str) -> None:
    model = text_model(TEXT[name][0], **TEXT[name][1])
    inputs = {"input_ids": TOKENS, "labels": TOKENS}
    assert_same_outputs(model, inputs)
    assert multiplying_weights(model) <= sparsify(model, density=0.3).updater.masks.keys()
    assert_trains(model, inputs, lambda output: output.loss)
    report = flop_report(sparsify(model, density=0.3), inputs)
    assert 0 < report.sparse_macs < report.dense_macs


def test_vision_and_speech_transformers() -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**small, image_size=32, patch_size=8)
    images = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    vit = transformers.ViTForImageClassification(config)
    assert_same_outputs(vit, images)
    assert multiplying_weights(vit) <= sparsify(vit, density=0.3).updater.masks.keys()
    assert_trains(vit, images, lambda output: output.loss)
    whisper = transformers.WhisperConfig(
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=64,
        max_source_positions=20,
        num_mel_bins=8,
    )
    encoder = transformers.models.whisper.modeling_whisper.WhisperEncoder(whisper)
    speech = {"input_features": torch.randn(2, 8, 40)}
    assert_same_outputs(encoder, speech)
    assert multiplying_weights(encoder) <= sparsify(encoder, density=0.3).updater.masks.keys()
    assert_trains(encoder, speech, lambda output: output.last_hidden_state.square().mean())


# timm


def family(name: str) -> str:
    return timm.models.model_entrypoint(name).__module__


def smallest_of_each_family() -> list[str]:
    """By name, of every second family: building them all to compare would take longer than the test."""
    words = ("test", "tiny", "nano", "atto", "small", "18", "_s", "b0", "xs", "pico")
    names = sorted(timm.list_models(), key=lambda n: (family(n), not any(w in n for w in words), len(n), n))
    return list({family(name): name for name in reversed(names)}.values())[::2]


TIMM = smallest_of_each_family()


def test_timm_families_are_many() -> None:
    assert len(TIMM) >= 40


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    shape = (1, *model.default_cfg["input_size"])
    sparse = sparsify(
        model, density=0.1, method=RigL(interval=2), inputs=shape, exclude=("*.latent",) * ("naflexvit" in name)
    )
    report = flop_report(sparse, shape)
    assert (
        report.dense_macs
        == flop_report(model, shape).dense_macs
        == half_of_torch_count(model, (torch.empty(shape, device="meta"),))
    )
    # What is not masked is named with its reason, and is little.
    reasons = {layer.name: layer.reason for layer in report.layers if layer.params and layer.status != "masked"}
    assert all(reasons.values())
    assert reasons.keys() == sparse.updater.rules.keys()
    # A training step and an update run; the weights are on the meta device, so that only counts can be compared.
    counts, optimizer = sparse.updater.nonzeros, torch.optim.SGD(sparse.train().parameters(), 0.1)
    sparse.updater.attach(optimizer, total_steps=8)
    for _ in range(2):
        optimizer.zero_grad()
        result = pytree.tree_leaves(sparse(torch.empty((2, *shape[1:]), device="meta")))
        sum(t.float().mean() for t in result if isinstance(t, Tensor)).backward()
        optimizer.step()
    assert sparse.updater.nonzeros == counts
    if sum(p.numel() for p in model.parameters()) < 3_000_000:
        real = timm.create_model(name)
        assert_same_outputs(real, (torch.randn(2, *shape[1:], generator=torch.Generator().manual_seed(0)),))
