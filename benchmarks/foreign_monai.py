"""The networks of monai, small, found in its registry: arguments are filled in by their names."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from foreign_attempts import Make, classes, filled, first_that_runs, random, tokens
from torch import nn

Values = dict[str, Any]

NET: Values = {"in_channels": 1, "n_input_channels": 1, "out_channels": 2, "num_classes": 3, "channels": (8, 16, 32)}
NET |= {"strides": (2, 2), "hidden_size": 24, "mlp_dim": 32, "num_layers": 2, "num_heads": 2, "patch_size": 16}
NET |= {"feature_size": 12, "features": (8, 8, 16, 16, 16, 8), "init_filters": 8, "kernel_size": 3, "latent_size": 4}
NET |= {"decoder_hidden_size": 24, "decoder_mlp_dim": 32, "decoder_num_layers": 1, "decoder_num_heads": 2}
NET |= {"num_channel_initial": 8, "extract_levels": (0, 1), "layers": (1, 1, 1, 1), "block_inplanes": (8, 16, 16, 32)}
NET |= {
    "block": "basic",
    "pretrained": False,
    "freeze_encoder": False,
    "model_name": "efficientnet-b0",
    "backbone": "efficientnet-b0",
}
NET |= {
    "hidden_channels": (16, 16),
    "encode_channels": (16,),
    "decode_channels": (16,),
    "classes": 3,
    "out_shape": (2,),
}
NET |= {"num_res_units": 1, "num_tokens": 60, "max_seq_len": 16, "attn_layers_dim": 32, "attn_layers_depth": 2}
NET |= {"attn_layers_heads": 2, "upsample_kernel_size": (2, 2), "unet_out_channels": 2, "final_conv_channels": (8,)}
NET |= {"num_layers_d": 2, "num_d": 1, "minimum_size_im": 32, "num_filters": 8, "norm_num_groups": 8, "label_nc": 3}
NET |= {"num_res_blocks": (1, 1, 1), "attention_levels": (False, False, True), "num_head_channels": 8, "dsdepth": 1}
NET |= {
    "init_features": 8,
    "growth_rate": 8,
    "block_config": (2, 2),
    "mil_mode": "att",
    "depth": 2,
    "num_embeddings": 16,
}
NET |= {
    "groups": 1,
    "reduction": 4,
    "in_planes": 1,
    "planes": 8,
    "dim": 4,
    "blocks_args_str": ["r1_k3_s11_e1_i32_o16_se0.25"],
}
NET |= {"num_language_layers": 1, "num_vision_layers": 1, "num_mixed_layers": 1, "vocab_size": 60}
NET |= {"num_res_layers": 1, "num_res_channels": (8, 16, 32), "embedding_dim": 8, "depths": (1, 1, 1, 1)}


def monai_models() -> dict[str, Make]:
    """Return the networks of monai."""
    from monai.networks import nets

    return {name: partial(_monai, cls) for name, cls in classes(nets).items()}


# What some networks call otherwise than the rest does.
SENET: Values = {"layers": (1, 1, 1, 1), "num_classes": 3}
OWN: dict[str, Values] = {
    "AHNet": {"psp_block_num": 0},
    "DAF3D": {"spatial_dims": 3},
    "MILModel": {"backbone": "resnet18", "mil_mode": "att_trans", "trans_blocks": 1},
    "MultiScalePatchDiscriminator": {"channels": 8, "kernel_size": 4},
    "PatchDiscriminator": {"channels": 8, "kernel_size": 4},
    "RegUNet": {"depth": 2, "extract_levels": (0, 1, 2)},
    "ResNetEncoder": {"model_name": "resnet10"},
    "ResNetFeatures": {"model_name": "resnet10"},
    "SENet154": SENET | {"groups": 64},
    "SEResNet50": SENET,
    "SEResNext50": SENET | {"groups": 32},
    "SPADENet": {"channels": [16, 8], "label_nc": 3},
    "SwinUNETR": {"num_heads": (1, 2, 4, 8), "patch_size": 2},
    "TorchVisionFCModel": {"model_name": "resnet18", "use_conv": False, "pool": None},
    "VoxelMorphUNet": {"in_channels": 2, "channels": (8, 16, 16, 16), "final_conv_channels": (8, 8)},
}


def _monai(cls: type[nn.Module]) -> tuple[nn.Module, Any]:
    return first_that_runs(attempt for dims in (2, 3) for attempt in _monai_attempts(cls, dims))


def _monai_attempts(cls: type[nn.Module], dims: int) -> Iterator[tuple[Callable[[], nn.Module], Any]]:
    size = (32,) * dims
    shapes = {"spatial_dims": dims, "img_size": size, "image_size": size, "input_shape": size, "input_image_size": size}
    shapes |= {"in_shape": (1, *size), "latent_shape": (4,), "start_shape": (8, *(8,) * dims), "patch_size": 16}
    nets = NET | shapes | OWN.get(cls.__name__, {})
    deep = nets | {"kernel_size": (3, 3, 3), "strides": (1, 2, 2), "channels": (32, 64, 64)}
    image, step, labels = random(2, 1, *size), torch.tensor([1, 2]), random(2, 3, *size).softmax(1)
    given = [
        (image,),
        (random(2, 3, *size),),
        (image, image),
        (image, step),
        (image, step, labels),
        (image, step, image),
    ]
    given += [(image, labels), (labels, image), (random(2, 2, *size),), (random(2, 1, *(64,) * dims),)]
    given += [(tokens(2, 8),), (random(2, 1),), (random(2, 4),), (random(2, 2, 3, *size),), ([[random(1, *size)] * 2],)]
    return ((make, inputs) for make in filled(cls, nets, deep) for inputs in given)
