"""Configurations of transformers, cut down by the names of their numbers."""

import re
from typing import Any

Numbers = tuple[tuple[str, int], ...]
Kept = dict[int, list[int]]  # {length of the lists with an item per layer: the layers that stay}

SIZE, VOCABULARY = 64, 128

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
# Lists with an item per stage: how many blocks, of which one stays, and how wide, of which a quarter stays.
BLOCKS = "depths|blocks_per_stage|stage_num_blocks"
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

# What follows from no name; {pattern of models, or of parts of them: values of their configurations}.
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
    "(donut-|maskformer-)?swin(v2)?": {"embed_dim": 24, "hidden_size": 192, "window_size": 4},
    "xmod": {"default_language": "en_XX"},
    "wav2vec2-bert": {"vocab_size": 32},
    "dia_encoder|dia": {"max_position_embeddings": 128},
}


def configuration(name: str, numbers: Numbers) -> Any:
    """Return a model's default configuration with its numbers cut down, those of its parts too."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[name]
    return cls(**_shrunk(cls().to_dict(), numbers))


def _shrunk(values: dict[Any, Any], numbers: Numbers) -> dict[Any, Any]:
    kept = _kept_layers(values)
    depth = max(map(len, kept.values()), default=2)
    if isinstance(values.get("num_hidden_layers"), int) and (features := values.get("out_features")):
        depth = max(depth, len(features))
        values = {k: v for k, v in values.items() if k not in ("out_indices", "stage_names")}
        values["out_features"] = [f"stage{i + 1}" for i in range(depth - len(features), depth)]
    layers = tuple((pattern, max(most, depth)) for pattern, most in numbers[:1])
    own = next((own for kind, own in OWN.items() if re.fullmatch(kind, values.get("model_type") or "")), {})
    return {name: _cut(str(name), value, layers + numbers[1:], kept) for name, value in values.items()} | own


def _cut(name: str, value: Any, numbers: Numbers, kept: Kept) -> Any:
    """Cut one value of a configuration: a part of it, a token, a list, or a number."""
    if name == "per_layer_config":
        return {layers.index(i): v for i, v in value.items() for layers in kept.values() if i in layers}
    if isinstance(value, dict):
        return _shrunk(value, numbers)
    if name.endswith(("token_id", "token_index")):
        return _token(name, value)
    if isinstance(value, (list, tuple)):
        return _cut_list(name, list(value), (WIDTHS, 64) in numbers, kept)
    limit = next((most for pattern, most in numbers if re.fullmatch(pattern, name)), None)
    return value if limit is None or isinstance(value, bool) or not isinstance(value, int) else min(value, limit)


def _cut_list(name: str, value: list[Any], narrow: bool, kept: Kept) -> list[Any]:
    """Cut a list: to the layers that stay, to stages of one block, to narrower stages, or to a smaller image."""
    if len(value) in kept:
        return [value[i] for i in kept[len(value)]]
    if name == "mrope_section":
        return [4, 2, 2]
    if not value or not all(isinstance(item, int) for item in value):
        return value
    if re.fullmatch(BLOCKS, name):
        return [1] * len(value)
    if name.endswith("image_size"):
        return [min(item, SIZE) for item in value]
    return [item // 4 for item in value] if narrow and min(value) >= 32 and re.fullmatch(STAGES, name) else value


def _token(name: str, value: Any) -> Any:
    """Move a special token into the small vocabulary, away from the tokens that inputs are made of."""
    if isinstance(value, list):
        return [_token(name, item) for item in value]
    stays = not isinstance(value, int) or (value < VOCABULARY and not re.search("image|video|audio", name))
    return value if stays else 64 + value % 64


def _kept_layers(values: dict[Any, Any]) -> Kept:
    """Find which layers stay where they are listed: one of each kind, and two at least."""
    listed = [v for k, v in values.items() if isinstance(v, list) and re.search("layer|block", str(k)) and len(v) > 4]
    kept = {}
    for kinds in listed:
        if all(isinstance(kind, str) for kind in kinds):
            first = sorted({kinds.index(kind) for kind in kinds})
            kept[len(kinds)] = first if len(first) > 1 else [0, 1]
    return kept
