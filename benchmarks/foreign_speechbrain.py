"""Networks of speechbrain, small and without weights, as their users would build them."""

import torch
from foreign_attempts import Listed, Make, listed_makes, random, tokens

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
        (random(2, 1, 1024), torch.tensor([1, 2]), random(2, 8, 4)),
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
        (random(2, 1, 16, 16), torch.tensor([1, 2])),
    ),
    f"{NNET}.quaternion_networks.q_RNN.QLSTM": ({"hidden_size": 8, "input_shape": (2, 40, 24)}, (LINES,)),
    f"{NNET}.complex_networks.c_RNN.CLSTM": ({"hidden_size": 8, "input_shape": (2, 40, 24)}, (LINES,)),
}


def speechbrain_models() -> dict[str, Make]:
    """Return networks of speechbrain."""
    return listed_makes("speechbrain", SPEECHBRAIN)
