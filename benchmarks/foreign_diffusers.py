"""Networks of diffusers, small and without weights, as their users would build them."""

import torch
from foreign_attempts import Listed, Make, listed_makes, random

STEP = torch.tensor([1, 2])
LATENTS, IMAGES, VIDEO, WORDS = random(2, 4, 8, 8), random(2, 3, 32, 32), random(2, 4, 4, 8, 8), random(2, 6, 16)
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "in_channels": 4, "sample_size": 8}
UNET = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8}
CROSS = UNET | {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 16}
UP = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
VAE = {"block_out_channels": (16, 32), "norm_num_groups": 8, "down_block_types": ("DownEncoderBlock2D",) * 2}
DECODER = {"up_block_types": ("UpDecoderBlock2D",) * 2}

DIFFUSERS: Listed = {
    "UNet1DModel": (
        {"sample_size": 64, "extra_in_channels": 32, "block_out_channels": (16, 16, 32)},
        (random(2, 2, 64), STEP),
    ),
    "UNet2DModel": (
        UNET | {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
        (IMAGES, STEP),
    ),
    "UNet2DConditionModel": (CROSS | UP, (LATENTS, STEP, WORDS)),
    "UNet3DConditionModel": (
        CROSS
        | {
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        (VIDEO, STEP, WORDS),
    ),
    "UNetMotionModel": (
        {
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "cross_attention_dim": 16,
            "num_attention_heads": 2,
            "motion_num_attention_heads": 2,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        },
        (VIDEO, STEP, random(2, 4, 6, 16)),
    ),
    "ControlNetModel": (
        CROSS | {"conditioning_embedding_out_channels": (8, 16)},
        (LATENTS, STEP, WORDS, random(2, 3, 16, 16)),
    ),
    "AutoencoderKL": (VAE | DECODER, (IMAGES,)),
    "AutoencoderKLTemporalDecoder": (
        {"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2},
        {"sample": IMAGES, "num_frames": 2},
    ),
    "AutoencoderTiny": (
        {
            "encoder_block_out_channels": (16, 16),
            "decoder_block_out_channels": (16, 16),
            "num_encoder_blocks": (1, 1),
            "num_decoder_blocks": (1, 1),
        },
        (IMAGES,),
    ),
    "AutoencoderDC": (
        {
            "latent_channels": 4,
            "attention_head_dim": 8,
            "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "encoder_block_out_channels": (8, 16),
            "decoder_block_out_channels": (8, 16),
            "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1),
            "encoder_qkv_multiscales": ((), (5,)),
            "decoder_qkv_multiscales": ((), (5,)),
        },
        (IMAGES,),
    ),
    "AutoencoderOobleck": (
        {
            "encoder_hidden_size": 8,
            "downsampling_ratios": [2, 4],
            "channel_multiples": [1, 2],
            "decoder_channels": 8,
            "decoder_input_channels": 4,
        },
        (random(2, 2, 64),),
    ),
    "AutoencoderKLWan": (
        {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [False, True]},
        (random(1, 3, 5, 16, 16),),
    ),
    "AutoencoderKLCogVideoX": (
        {
            "block_out_channels": (8, 8, 16, 16),
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "sample_height": 16,
            "sample_width": 16,
        },
        (random(1, 3, 5, 16, 16),),
    ),
    "AsymmetricAutoencoderKL": (
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "down_block_out_channels": (16, 32),
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "up_block_out_channels": (16, 32),
            "norm_num_groups": 8,
        },
        (IMAGES,),
    ),
    "VQModel": (VAE | DECODER | {"num_vq_embeddings": 32}, (IMAGES,)),
    "T2IAdapter": ({"channels": [16, 32], "num_res_blocks": 1, "downscale_factor": 2}, (IMAGES,)),
    "DiTTransformer2DModel": (HEADS | {"num_embeds_ada_norm": 10}, (LATENTS, STEP, torch.tensor([3, 4]))),
    "PixArtTransformer2DModel": (
        HEADS | {"cross_attention_dim": 32, "caption_channels": 16},
        {
            "hidden_states": LATENTS,
            "encoder_hidden_states": WORDS,
            "timestep": STEP,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "Transformer2DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "norm_num_groups": 4,
            "cross_attention_dim": 16,
        },
        (LATENTS, WORDS),
    ),
    "SD3Transformer2DModel": (
        HEADS
        | {
            "joint_attention_dim": 16,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 8,
        }
        | {"out_channels": 4},
        (LATENTS, WORDS, random(2, 16), STEP),
    ),
    "FluxTransformer2DModel": (
        {
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 4, 8),
        },
        (random(2, 16, 4), WORDS, random(2, 16), STEP / 10, torch.zeros(16, 3), torch.zeros(6, 3)),
    ),
    "AuraFlowTransformer2DModel": (
        {
            "sample_size": 8,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 16,
        },
        (LATENTS, WORDS, STEP / 10),
    ),
    "SanaTransformer2DModel": (
        HEADS
        | {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32}
        | {"caption_channels": 16, "out_channels": 4},
        (LATENTS, WORDS, STEP),
    ),
    "CogVideoXTransformer3DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 16,
            "num_layers": 2,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": 6,
        },
        (random(2, 2, 4, 8, 8), WORDS, STEP),
    ),
    "WanTransformer3DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 2,
            "rope_max_seq_len": 32,
        },
        (random(2, 4, 2, 8, 8), STEP, WORDS),
    ),
    "PriorTransformer": (
        {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "embedding_dim": 16, "num_embeddings": 6},
        (random(2, 16), STEP, random(2, 16), WORDS),
    ),
    "StableAudioDiTModel": (
        {
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 1,
            "cross_attention_dim": 16,
            "time_proj_dim": 8,
            "global_states_input_dim": 16,
            "cross_attention_input_dim": 16,
        },
        (random(2, 4, 16), STEP / 10, WORDS, random(2, 1, 16)),
    ),
}


def diffusers_models() -> dict[str, Make]:
    """Return networks of diffusers."""
    return listed_makes("diffusers", DIFFUSERS)
