"""Networks of torchrl, small, as their users would build them."""

from foreign_attempts import Listed, Make, listed_makes, random

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
    "DuelingCnnDQNet": ({"out_features": 4, "cnn_kwargs": CNN, "mlp_kwargs": {"num_cells": 32, "depth": 1}}, (FRAME,)),
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


def torchrl_models() -> dict[str, Make]:
    """Return networks of torchrl."""
    return listed_makes("torchrl.modules", TORCHRL)
