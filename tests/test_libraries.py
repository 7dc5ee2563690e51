"""Models of libraries that were not written for fx: transformers and timm, found in the libraries, not listed by hand."""

from typing import Any

import pytest
import timm
import torch
import transformers
from behaviour import TOKENS, assert_same_outputs, assert_trains, half_of_torch_count
from models import swept
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsify import RigL, flop_report, sparsify

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
    """By name: building them all to compare would take longer than the test."""
    words = ("test", "tiny", "nano", "atto", "small", "18", "_s", "b0", "xs", "pico")
    names = sorted(timm.list_models(), key=lambda n: (family(n), not any(w in n for w in words), len(n), n))
    return list({family(name): name for name in reversed(names)}.values())


TIMM = smallest_of_each_family()
SLOW = {"efficientvit_m0", "hrnet_w18", "legacy_senet154"}  # ten seconds and more
SAMPLED = swept(TIMM, set(TIMM[::12]) - SLOW)


def test_timm_families_are_many() -> None:
    assert len(TIMM) >= 80


@pytest.mark.parametrize("name", SAMPLED)
def test_timm(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    shape = (1, *model.default_cfg["input_size"])
    sparse = sparsify(model, density=0.1, method=RigL(interval=2), inputs=shape, exclude=("*.latent",) * ("naflexvit" in name))
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
