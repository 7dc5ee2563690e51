"""Models of diffusers, torchrl and speechbrain, small and without weights, as their users would build them."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from foreign_attempts import first_that_runs, random, tokens
from foreign_models import Make
from torch import nn

Listed = dict[str, tuple[dict[str, Any], Any]]  # {class: (arguments, inputs)}

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
        UNET
        | {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
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

CELLS = {"num_cells": [32, 32]}
CNN = {"num_cells": [8, 8, 16], "kernel_sizes": 3, "strides": [1, 1, 1], "in_features": 3}
FRAME, STATE = random(2, 3, 24, 24), random(4, 12)
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_inner": 64, "activation": "relu", "n_positions": 64}
GPT |= {"resid_pdrop": 0.1, "attn_pdrop": 0.1}

TORCHRL: Listed = {
    "MLP": ({"in_features": 12, "out_features": 4, **CELLS}, (STATE,)),
    "ConvNet": (CNN, (FRAME,)),
    "Conv3dNet": (CNN, (random(2, 3, 8, 12, 12),)),
    "NoisyLinear": ({"in_features": 12, "out_features": 8}, (STATE,)),
    "DdpgMlpActor": ({"action_dim": 4, "mlp_net_kwargs": {"in_features": 12, **CELLS}}, (STATE,)),
    "DdpgMlpQNet": (
        {
            "mlp_net_kwargs_net1": {"in_features": 12, "num_cells": 32, "depth": 1},
            "mlp_net_kwargs_net2": {"in_features": 404, "num_cells": 32, "depth": 1},
        },
        (STATE, random(4, 4)),
    ),
    "DdpgCnnActor": ({"action_dim": 4, "conv_net_kwargs": CNN, "use_avg_pooling": True}, (FRAME,)),
    "DdpgCnnQNet": ({"conv_net_kwargs": CNN}, (FRAME, random(2, 4))),
    "DuelingCnnDQNet": ({"out_features": 4, "cnn_kwargs": CNN, "mlp_kwargs": CELLS}, (FRAME,)),
    "MultiAgentMLP": (
        {
            "n_agent_inputs": 12,
            "n_agent_outputs": 4,
            "n_agents": 3,
            "centralized": False,
            "share_params": True,
            **CELLS,
        },
        (random(2, 3, 12),),
    ),
    "MultiAgentMLP apart": (
        {
            "n_agent_inputs": 12,
            "n_agent_outputs": 4,
            "n_agents": 3,
            "centralized": True,
            "share_params": False,
            **CELLS,
        },
        (random(2, 3, 12),),
    ),
    "MultiAgentConvNet": (
        {
            "n_agents": 3,
            "centralized": False,
            "share_params": True,
            "in_features": 3,
            "num_cells": [8, 8],
            "kernel_sizes": 3,
        },
        (random(2, 3, 3, 24, 24),),
    ),
    "LSTM": ({"input_size": 12, "hidden_size": 16, "num_layers": 2}, (random(2, 5, 12),)),
    "GRU": ({"input_size": 12, "hidden_size": 16, "num_layers": 2}, (random(2, 5, 12),)),
    "LSTMCell": ({"input_size": 12, "hidden_size": 16}, (STATE,)),
    "GRUCell": ({"input_size": 12, "hidden_size": 16}, (STATE,)),
    "ObsEncoder": ({"channels": 8, "num_layers": 3, "in_channels": 3}, (random(2, 3, 64, 64),)),
    "ObsDecoder": ({"channels": 4, "latent_dim": 24}, (random(2, 16), random(2, 8))),
    "RSSMPosterior": (
        {"hidden_dim": 16, "state_dim": 8, "rnn_hidden_dim": 16, "obs_embed_dim": 12},
        (random(2, 16), random(2, 12)),
    ),
    "DreamerActor": ({"out_features": 4, "depth": 2, "num_cells": 16}, (random(2, 8), random(2, 16))),
    "DecisionTransformer": (
        {"state_dim": 12, "action_dim": 4, "config": GPT},
        (random(2, 5, 12), random(2, 5, 4), random(2, 5, 1)),
    ),
    "DTActor": (
        {"state_dim": 12, "action_dim": 4, "transformer_config": GPT},
        (random(2, 5, 12), random(2, 5, 4), random(2, 5, 1)),
    ),
    "OnlineDTActor": (
        {"state_dim": 12, "action_dim": 4, "transformer_config": GPT},
        (random(2, 5, 12), random(2, 5, 4), random(2, 5, 1)),
    ),
    "QMixer": (
        {"state_shape": (12,), "mixing_embed_dim": 8, "n_agents": 3, "device": "cpu"},
        (random(2, 3, 1), random(2, 12)),
    ),
    "VDNMixer": ({"n_agents": 3, "device": "cpu"}, (random(2, 3, 1),)),
}

LINES = random(2, 40, 24)  # batch, time, features
MODELS, NNET, TRANSFORMER = "lobes.models", "nnet", "lobes.models.transformer"
NET = {"d_model": 32, "nhead": 2, "d_ffn": 64}
MEL = {"input_shape": (None, None, 24)}

SPEECHBRAIN: Listed = {
    f"{MODELS}.ECAPA_TDNN.ECAPA_TDNN": (
        {"input_size": 24, "channels": [16] * 4 + [48], "attention_channels": 8, "lin_neurons": 16, "se_channels": 8},
        (LINES,),
    ),
    f"{MODELS}.ECAPA_TDNN.Classifier": ({"input_size": 24, "out_neurons": 10}, (LINES,)),
    f"{MODELS}.Xvector.Xvector": (
        {"in_channels": 24, "tdnn_channels": [16] * 4 + [32], "lin_neurons": 16},
        (LINES,),
    ),
    f"{MODELS}.CRDNN.CRDNN": (
        MEL | {"cnn_channels": [8, 8], "rnn_layers": 2, "rnn_neurons": 16, "dnn_neurons": 16},
        (LINES,),
    ),
    f"{MODELS}.ESPnetVGG.ESPnetVGG": (MEL | {"cnn_channels": [8, 8], "rnn_neurons": 16, "rnn_layers": 1}, (LINES,)),
    f"{MODELS}.ContextNet.ContextNet": (MEL | {"out_channels": 16, "num_blocks": 23, "num_layers": 1}, (LINES,)),
    f"{MODELS}.VanillaNN.VanillaNN": (MEL | {"dnn_neurons": 16}, (LINES,)),
    f"{MODELS}.GatedNN.GatedNN": (MEL | {"neurons": 16}, (LINES,)),
    f"{MODELS}.RNNLM.RNNLM": ({"output_neurons": 60, "embedding_dim": 16, "rnn_neurons": 16}, (tokens(2, 8),)),
    f"{MODELS}.ResNet.ResNet": (
        {"input_size": 24, "channels": [8, 8, 16, 16], "block_sizes": [1, 1, 1, 1], "lin_neurons": 16},
        (LINES,),
    ),
    f"{MODELS}.MetricGAN.EnhancementGenerator": (
        {"input_size": 24, "hidden_size": 200, "num_layers": 1},
        (LINES, torch.ones(2)),
    ),
    f"{MODELS}.MetricGAN.MetricDiscriminator": ({}, (random(2, 2, 40, 24),)),
    f"{MODELS}.HifiGAN.HifiganGenerator": (
        {
            "in_channels": 8,
            "out_channels": 1,
            "resblock_type": "1",
            "resblock_dilation_sizes": [[1, 3, 5]],
            "resblock_kernel_sizes": [3],
            "upsample_kernel_sizes": [8, 4],
            "upsample_initial_channel": 16,
            "upsample_factors": [4, 2],
        },
        (random(2, 8, 12),),
    ),
    f"{MODELS}.HifiGAN.DiscriminatorP": ({"period": 2}, (random(2, 1, 400),)),
    f"{MODELS}.DiffWave.DiffWave": (
        {
            "input_channels": 8,
            "residual_layers": 2,
            "residual_channels": 8,
            "dilation_cycle_length": 2,
            "total_steps": 10,
        },
        (random(2, 1, 1024), STEP, random(2, 8, 4)),
    ),
    f"{MODELS}.Tacotron2.Postnet": ({"n_mel_channels": 8, "postnet_embedding_dim": 16}, (random(2, 8, 20),)),
    f"{MODELS}.FastSpeech2.PostNet": ({"n_mel_channels": 8, "postnet_embedding_dim": 16}, (random(2, 20, 8),)),
    f"{MODELS}.conv_tasnet.MaskNet": (
        {"N": 16, "B": 8, "H": 16, "P": 3, "X": 2, "R": 1, "C": 2},
        (random(2, 16, 40).movedim(1, 1),),
    ),
    f"{MODELS}.wav2vec.W2VLatentExtractor": (
        {"out_channels": [16, 16], "kernel_sizes": [11, 3], "strides": [5, 2]},
        (random(2, 400),),
    ),
    f"{MODELS}.dual_path.SBTransformerBlock": (
        {"num_layers": 1, "d_model": 16, "nhead": 2, "d_ffn": 32},
        (random(2, 10, 16),),
    ),
    f"{MODELS}.dual_path.SBRNNBlock": ({"input_size": 16, "hidden_channels": 8, "num_layers": 1}, (random(2, 10, 16),)),
    f"{MODELS}.dual_path.DPTNetBlock": ({"d_model": 16, "nhead": 2, "dim_feedforward": 16}, (random(2, 10, 16),)),
    f"{TRANSFORMER}.TransformerASR.TransformerASR": (
        NET | {"tgt_vocab": 60, "input_size": 24, "num_encoder_layers": 2, "num_decoder_layers": 2},
        (LINES, tokens(2, 8)),
    ),
    f"{TRANSFORMER}.TransformerASR.TransformerASR conformer": (
        NET
        | {"tgt_vocab": 60, "input_size": 24, "num_encoder_layers": 2, "num_decoder_layers": 2}
        | {"encoder_module": "conformer", "normalize_before": True, "attention_type": "RelPosMHAXL"},
        (LINES, tokens(2, 8)),
    ),
    f"{TRANSFORMER}.TransformerASR.TransformerASR branchformer": (
        NET
        | {"tgt_vocab": 60, "input_size": 24, "num_encoder_layers": 2, "num_decoder_layers": 1}
        | {"encoder_module": "branchformer", "attention_type": "RelPosMHAXL", "csgu_linear_units": 32},
        (LINES, tokens(2, 8)),
    ),
    f"{TRANSFORMER}.TransformerLM.TransformerLM": (
        NET | {"vocab": 60, "num_encoder_layers": 2, "num_decoder_layers": 0},
        (tokens(2, 8),),
    ),
    f"{TRANSFORMER}.TransformerST.TransformerST": (
        NET
        | {"tgt_vocab": 60, "input_size": 24, "num_encoder_layers": 1, "num_decoder_layers": 1}
        | {"ctc_weight": 0.0, "asr_weight": 0.0, "mt_weight": 0.0},
        (LINES, tokens(2, 8)),
    ),
    f"{NNET}.RNN.LSTM": ({"hidden_size": 16, "input_size": 24, "bidirectional": True}, (LINES,)),
    f"{NNET}.RNN.GRU": ({"hidden_size": 16, "input_size": 24, "num_layers": 2}, (LINES,)),
    f"{NNET}.RNN.RNN": ({"hidden_size": 16, "input_size": 24}, (LINES,)),
    f"{NNET}.RNN.LiGRU": ({"hidden_size": 16, "input_shape": (2, 40, 24)}, (LINES,)),
    f"{NNET}.RNN.SLiGRU": ({"hidden_size": 16, "input_shape": (2, 40, 24)}, (LINES,)),
    f"{NNET}.RNN.QuasiRNN": ({"hidden_size": 16, "input_size": 24}, (LINES,)),
    f"{NNET}.CNN.SincConv": ({"out_channels": 8, "kernel_size": 11, "in_channels": 1}, (random(2, 200),)),
    f"{NNET}.hypermixing.HyperMixing": ({"input_output_dim": 16, "hypernet_size": 16}, (random(2, 10, 16),) * 3),
    f"{NNET}.attention.RelPosMHAXL": (
        {"embed_dim": 16, "num_heads": 2},
        {"query": random(2, 6, 16), "key": random(2, 6, 16), "value": random(2, 6, 16), "pos_embs": random(1, 11, 16)},
    ),
    f"{NNET}.unet.UNetModel": (
        {
            "in_channels": 1,
            "model_channels": 8,
            "out_channels": 1,
            "num_res_blocks": 1,
            "attention_resolutions": [2],
            "channel_mult": (1, 2),
            "norm_num_groups": 4,
        },
        (random(2, 1, 16, 16), STEP),
    ),
    f"{NNET}.quaternion_networks.q_RNN.QLSTM": ({"hidden_size": 8, "input_shape": (2, 40, 24)}, (LINES,)),
    f"{NNET}.complex_networks.c_RNN.CLSTM": ({"hidden_size": 8, "input_shape": (2, 40, 24)}, (LINES,)),
}


def diffusers_models() -> dict[str, Make]:
    """Return networks of diffusers."""
    return _makes("diffusers", DIFFUSERS)


def torchrl_models() -> dict[str, Make]:
    """Return networks of torchrl."""
    return _makes("torchrl.modules", TORCHRL)


def speechbrain_models() -> dict[str, Make]:
    """Return networks of speechbrain."""
    return _makes("speechbrain", SPEECHBRAIN)


def _makes(module: str, listed: Listed) -> dict[str, Make]:
    return {name: partial(_make, module, name, *listed[name]) for name in listed}


def _make(module: str, name: str, arguments: dict[str, Any], inputs: Any) -> tuple[nn.Module, Any]:
    folder, _, cls = name.split(" ")[0].rpartition(".")
    make: Callable[..., nn.Module] = getattr(importlib.import_module(f"{module}.{folder}".rstrip(".")), cls)
    return first_that_runs(iter([(partial(make, **arguments), inputs)]))
