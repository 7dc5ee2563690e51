"""The architectures of transformers, small and without weights, found in its own registry; and faults that are not ours.

A configuration is shrunk by the names of its numbers, and inputs are made by the names of forward's arguments. What does not
run that way is tried again shrunk less, with fewer inputs, or without its head.
"""

import inspect
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

Make = Callable[[], tuple[nn.Module, Any]]
Numbers = tuple[tuple[str, int], ...]

LARGEST = 30_000_000  # parameters; what cannot be shrunk below that takes too long
BATCH, LENGTH, SIZE, VOCABULARY = 2, 12, 64, 128

# {pattern of "package/model": why a failure is not this library's}
FAULTS: dict[str, str] = {}

# The first mapping that knows a model says which class is built: with a head where that is usual, for it is what is trained.
MAPPINGS = """CAUSAL_LM SEQ_TO_SEQ_CAUSAL_LM MASKED_LM IMAGE_CLASSIFICATION CTC SPEECH_SEQ_2_SEQ""".split()

# The most that a number may be, by the end of its name: the first pattern that matches counts.
LAYERS: Numbers = (
    (r"(num_|encoder_|decoder_|n_|resampler_)*(hidden_|encoder_|decoder_)?(layers?|depth)", 2),
    (r"num_blocks", 2),
    (r"(?!type_).*vocab_size.*", VOCABULARY),
)
WIDTHS = r".*(hidden_size|d_model|n_embd|embed_dim|hidden_dim|embedding_size|embedding_dim|emb_dim|projection_dim).*|width|dim"
OTHERS: Numbers = (
    (r".*(intermediate|ffn|mlp|inner|feed_forward)_?(hidden_)?(size|dim|length).*|d_ff|n_inner|dim_feedforward", 96),
    (r".*(num_|n_|routed_|local_)experts", 4),
    (r".*(experts_per_tok|top_?k|topk)(_experts)?", 2),
    (r"n_group|topk_group|moe_num_shared_experts", 1),
    (r"first_k_dense_replace", 1),
    (r".*(max_position_embeddings|n_positions|max_(source|target)_positions|context_length)", 128),
    (r".*image_size", SIZE),
    (r"num_(object_)?queries", 10),
    (r"index_topk|sliding_window|attention_window|block_size|chunk_size", 8),
    (r"mask_time_length|mask_feature_length", 2),
    (r"num_frames", 4),
)
# Widths of stages, which become a quarter.
STAGES = r".*hidden_sizes|embed_dims?|embed_dim_per_stage|.*(in|mid|out|stage|block)_?(out_)?channels|dims|widths"
SMALL: Numbers = (
    *LAYERS,
    *OTHERS,
    (r".*(key_value|kv)_heads", 2),
    (r".*heads?|n_head", 4),
    (r".*head_dim|d_kv|dim_head|.*lora_rank", 16),
    (WIDTHS, 64),
)
# Rotary embeddings fit the size that a head has; so heads stay as they are.
MEDIUM: Numbers = (*LAYERS, *OTHERS, (r".*heads?|n_head", 4), (r".*head_dim", 1024), (WIDTHS, 512))

# What follows from no name; {pattern of models: values of their configurations}.
OWN: dict[str, dict[str, Any]] = {
    "ministral|hunyuan_v1_.*|hunyuan_vl_text": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "nemotron": {"num_key_value_heads": 2},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "esm": {"vocab_size": 32, "pad_token_id": 1},
    "kimi_linear": {"num_key_value_heads": 4, "num_experts_per_token": 2},
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2, "topk_method": "greedy"},
    "longcat_flash": {"qk_head_dim": 32, "num_key_value_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16, "layer_types": ["mamba", "attention"]},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "nemotron_h": {"n_groups": 2},
    "glm4v_text|glm_ocr_text|glm_image_text": {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
    "xmod": {"default_language": "en_XX"},
    "wav2vec2-bert": {"vocab_size": 32},
    "dia_encoder|dia": {"max_position_embeddings": 128},
}


def transformers_models() -> dict[str, Make]:
    """Return how to make each architecture that transformers registers: its model and inputs that it takes."""
    from transformers.models.auto import modeling_auto as auto

    names = {name for mapping in _mappings() for name in getattr(auto, mapping)}
    return {name: partial(_first_that_runs, name) for name in sorted(names)}


def _mappings() -> list[str]:
    from transformers.models.auto import modeling_auto as auto

    return [name for name in dir(auto) if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES")]


def _first_that_runs(name: str) -> tuple[nn.Module, Any]:
    """Try classes, sizes and inputs until a model runs; raise the first error if none does."""
    first: Exception | None = None
    for cls in _classes(name):
        for numbers in (SMALL, MEDIUM, LAYERS):
            try:
                return _build(cls, _configuration(name, numbers))
            except Exception as error:  # anybody's code, and any error means the same: not this way
                first = first or error
    raise first or ValueError("no class is registered")


def _classes(name: str) -> list[type[nn.Module]]:
    """Return the classes of a model: with its usual head, without one, else what there is."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    mappings = [f"MODEL_FOR_{mapping}_MAPPING_NAMES" for mapping in MAPPINGS] + ["MODEL_MAPPING_NAMES"]
    found = [getattr(auto, mapping)[name] for mapping in (*mappings, *_mappings()) if name in getattr(auto, mapping)]
    names = [cls if isinstance(cls, str) else cls[0] for cls in found]
    return [getattr(transformers, cls) for cls in dict.fromkeys(names) if hasattr(transformers, cls)][:2]


def _configuration(name: str, numbers: Numbers) -> Any:
    """Return a model's default configuration with its numbers cut down, those of its parts too."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[name]
    own = [values for pattern, values in OWN.items() if re.fullmatch(pattern, name)]
    return cls(**_shrunk(cls().to_dict(), numbers) | (own[0] if own else {}))


def _shrunk(values: dict[str, Any], numbers: Numbers) -> dict[str, Any]:
    kept = _kept_layers(values)
    depth = max(map(len, kept.values()), default=2)
    if isinstance(values.get("num_hidden_layers"), int) and (features := values.get("out_features")):
        depth = max(depth, len(features))
        values = values | {"out_features": [f"stage{i + 1}" for i in range(depth)][-len(features) :]}
        values = {k: v for k, v in values.items() if k not in ("out_indices", "stage_names")}
    return {name: _cut(str(name), value, numbers, kept, depth) for name, value in values.items()}


def _cut(name: str, value: Any, numbers: Numbers, kept: dict[int, list[int]], depth: int) -> Any:
    """Cut one value of a configuration: a part of it, a number, or a list with an item per layer."""
    if name == "per_layer_config":
        return {layers.index(i): v for i, v in value.items() for layers in kept.values() if i in layers}
    if isinstance(value, dict):
        return _shrunk(value, numbers)
    if name.endswith(("token_id", "token_index")):
        return _token(value)
    if isinstance(value, list) and len(value) in kept:
        return [value[i] for i in kept[len(value)]]
    if name in ("depths", "blocks_per_stage", "stage_num_blocks") and isinstance(value, list):
        return [1] * len(value)
    if name == "mrope_section":
        return [4, 2, 2]
    if re.fullmatch(STAGES, name) and numbers is SMALL and isinstance(value, list):
        return [v // 4 if isinstance(v, int) else v for v in value] if min(_flat(value), default=0) >= 32 else value
    limit = next((most for pattern, most in numbers if re.fullmatch(pattern, name)), None)
    if limit is None or isinstance(value, bool):
        return value
    limit = max(limit, depth) if (limit, name) and re.fullmatch(LAYERS[0][0], name) else limit
    if isinstance(value, (list, tuple)) and name.endswith("image_size"):
        return [min(v, limit) for v in value]
    return min(value, limit) if isinstance(value, int) else value


def _flat(value: list[Any]) -> list[int]:
    return [v for v in value if isinstance(v, int)]


def _token(value: Any) -> Any:
    """Move a special token into the small vocabulary, away from the tokens that inputs are made of."""
    if isinstance(value, list):
        return [_token(v) for v in value]
    return value if not isinstance(value, int) or value < VOCABULARY else 64 + value % 64


def _kept_layers(values: dict[str, Any]) -> dict[int, list[int]]:
    """Return {length of the lists with an item per layer: the layers that stay, one of each kind and two at least}."""
    kinds = [v for k, v in values.items() if isinstance(v, list) and ("layer" in k or "block" in k) and len(v) > 4]
    kept = {}
    for listed in kinds:
        if all(isinstance(item, str) for item in listed):
            first = sorted({item: i for i, item in reversed(list(enumerate(listed)))}.values())
            kept[len(listed)] = first if len(first) > 1 else [0, 1]
    return kept


def _build(cls: type[nn.Module], config: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Build a model, and find inputs that it runs on."""
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters even when shrunk")
    torch.manual_seed(0)
    model = cls(config).float().eval()
    first: Exception | None = None
    for inputs in _inputs(model):
        try:
            with torch.no_grad():
                model(**inputs)
            return model, inputs
        except Exception as error:  # as above
            first = first or error
    raise first or ValueError(f"no inputs are known for {_required(model)}")


def _required(model: nn.Module) -> list[str]:
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]


def _inputs(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield sets of inputs, the fullest first: all that are known, those that are needed with masks, those that are needed."""
    taken, main = inspect.signature(model.forward).parameters, model.main_input_name
    needed = dict.fromkeys([*_required(model), *([main] if isinstance(main, str) else main)])
    for wanted in (KNOWN, {*needed, "attention_mask", "decoder_input_ids"}, needed):
        for layout in LAYOUTS:
            names = [name for name in taken if name in needed or (name in wanted and name not in OPTIONAL)]
            generator = torch.Generator().manual_seed(0)
            yield {name: KNOWN[name](Facts(model.config, layout, generator)) for name in names if name in KNOWN}


class Facts:
    """What inputs have to fit: numbers of a configuration, found by their usual names."""

    def __init__(self, config: Any, layout: str, generator: torch.Generator) -> None:
        self.values, self.layout, self.generator = config.to_dict(), layout, generator

    def __call__(self, names: str, default: int) -> int:
        """Return the first of some numbers that the configuration or a part of it has."""
        found = (_find(self.values, name) for name in names.split())
        return next((value for value in found if value), default)

    def tokens(self, length: int = LENGTH) -> Tensor:
        return torch.randint(3, min(60, self("vocab_size", 60)), (BATCH, length), generator=self.generator)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=self.generator)

    def image(self) -> Tensor:
        size = self("image_size img_size input_size", SIZE)
        shape = (self("num_channels in_channels in_chans", 3), size, size)
        frames = (self("num_frames frames_per_clip", 4),) if "video" in self.layout else ()
        return self.random(*frames, *shape)

    def patches(self) -> Tensor:
        side = self("patch_size", 14)
        return torch.randn(16, self("in_channels in_chans num_channels", 3) * self("temporal_patch_size", 1) * side**2)

    def series(self) -> Tensor:
        return self.random(self("context_length", 64), self("num_input_channels", 1))

    def spectrogram(self) -> Tensor:
        frames = 2 * self("max_source_positions", 32)
        bins = self("num_mel_bins feature_size input_feat_per_channel input_dim n_mels input_size", 80)
        return self.random(bins, frames) if "bins first" in self.layout else self.random(frames, bins)

    def wave(self) -> Tensor:
        if (length := self("max_length", 0)) and self("num_mel_bins", 0):
            return self.random(length, self("num_mel_bins", 0))
        return self.random(4000) if "video" in self.layout else self.random(1, 4000)


LAYOUTS = ("bins first", "bins last, video")
# What is made for an argument of forward, by its name.
KNOWN: dict[str, Callable[[Facts], Any]] = {
    "input_ids": Facts.tokens,
    "attention_mask": lambda facts: torch.ones(BATCH, LENGTH, dtype=torch.long),
    "decoder_input_ids": lambda facts: facts.tokens(6),
    "pixel_values": Facts.image,
    "input_features": Facts.spectrogram,
    "input_values": Facts.wave,
    "grid_thw": lambda facts: torch.tensor([[1, 4, 4]]),
    "image_grid_thw": lambda facts: torch.tensor([[1, 4, 4]]),
    "hidden_states": Facts.patches,
    "query_embeds": lambda facts: facts.random(4, facts("hidden_size", 64)),
    "pixel_values_videos": Facts.image,
    "past_values": Facts.series,
    "bbox": lambda facts: torch.tensor([1, 2, 8, 9]).expand(BATCH, LENGTH, 4),
}
OPTIONAL = {"hidden_states", "query_embeds", "pixel_values_videos", "grid_thw", "image_grid_thw"}


def _find(values: dict[str, Any], name: str) -> int:
    """Return a number of a configuration, or of the first part of it that has it; 0 where none does."""
    value = values.get(name)
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return next((n for v in values.values() if isinstance(v, dict) and (n := _find(v, name))), 0)
