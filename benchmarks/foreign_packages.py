"""Models of packages beside transformers, small and without weights, found in their registries."""

import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from foreign_attempts import filled, first_that_runs, random, tokens
from foreign_listed import diffusers_models, speechbrain_models, torchrl_models
from foreign_models import Make, transformers_models
from torch import nn

os.environ |= {"YOLO_CONFIG_DIR": "/tmp", "YOLO_VERBOSE": "false", "YOLO_OFFLINE": "true"}

Values = dict[str, Any]


def _classes(module: ModuleType) -> dict[str, type[nn.Module]]:
    """Return a module's own network classes."""
    found = {
        name: value for name, value in vars(module).items() if inspect.isclass(value) and issubclass(value, nn.Module)
    }
    return {name: cls for name, cls in found.items() if cls.__name__ == name and not name.startswith("_")}


# vit-pytorch

FLAT: Values = {
    "image_size": 64,
    "img_size": 64,
    "patch_size": 16,
    "num_classes": 10,
    "dim": 32,
    "depth": 2,
    "heads": 2,
}
FLAT |= {"dim_head": 16, "mlp_dim": 64, "mlp_mult": 2, "cls_depth": 1, "sm_dim": 32, "lg_dim": 32, "num_slots": 4}
FLAT |= {"max_tokens_per_depth": (8, 4), "spatial_depth": 1, "temporal_depth": 1, "frames": 4, "frame_patch_size": 2}
FLAT |= {"image_patch_size": 16, "seq_len": 64, "ndim": 2, "input_shape": (64, 64), "num_residual_streams": 2}
FLAT |= {
    "freq_patch_size": 16,
    "num_hierarchies": 2,
    "block_repeats": 1,
    "stages": 2,
    "embedding_dim": 32,
    "num_layers": 2,
}
FLAT |= {"sequence_length": 16, "sm_patch_size": 16, "lg_patch_size": 32, "reduction_factor": 2, "local_patch_size": 4}
FLAT |= {f"s{i + 1}_emb_dim": 16 << i for i in range(4)} | {f"s{i + 1}_local_patch_size": 2 for i in range(4)}
FLAT |= {f"s{i + 1}_depth": 1 for i in range(4)} | {f"s{i + 1}_global_k": 2 for i in range(4)}
FLAT |= {"num_heads": 2, "highres_patch_size": 8, "sm_enc_heads": 2, "lg_enc_heads": 2, "max_frames": 4}
STAGED: Values = FLAT | {
    "dim": (32, 64, 128, 256),
    "depth": (1, 1, 1, 1),
    "heads": (1, 2, 4, 8),
    "window_size": 2,
    "local_window_size": 2,
}
STAGED |= {"global_window_size": (4, 2, 2, 2)}
STAGED |= {
    "reduction_factor": (8, 4, 2, 1),
    "dims": [32, 48, 64],
    "channels": [16, 32, 32, 48, 48, 64, 64, 80, 80, 96, 128],
}
STEMMED: Values = FLAT | {"depth": (1, 1), "window_size": 4, "dim_conv_stem": 16}


def vit_pytorch_models() -> dict[str, Make]:
    """Return the classifiers of vit-pytorch, from all its modules."""
    import vit_pytorch

    makes = {}
    for info in pkgutil.iter_modules(vit_pytorch.__path__):
        for name, cls in _classes(importlib.import_module(f"vit_pytorch.{info.name}")).items():
            if cls.__module__.endswith(info.name) and "num_classes" in inspect.signature(cls).parameters:
                makes[f"{info.name}.{name}"] = partial(_vit, cls)
    return makes


def _vit(cls: type[nn.Module]) -> tuple[nn.Module, Any]:
    images = (random(2, 3, 64, 64),), (random(2, 3, 4, 64, 64),), (random(2, 3, 64),), ([random(3, 64, 64)] * 2,)
    ways = filled(cls, FLAT, STAGED, STEMMED)
    return first_that_runs((make, inputs) for make in ways for inputs in images)


# monai

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

    return {name: partial(_monai, cls) for name, cls in _classes(nets).items()}


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


# pytorchcv, open_clip, ultralytics, segmentation-models-pytorch


def pytorchcv_models() -> dict[str, Make]:
    """Return one model of each family of pytorchcv, the first that it registers."""
    from pytorchcv import model_provider

    first = {make.__module__: (name, make) for name, make in reversed(model_provider._models.items())}
    return {name: partial(_pytorchcv, make) for name, make in sorted(first.values())}


def _pytorchcv(make: Callable[..., nn.Module]) -> tuple[nn.Module, Any]:
    sizes = (32, 64, 96, 128, 224, 320)
    attempts = [
        (partial(make, **options), (random(2, 3, n, n),)) for n in sizes for options in ({}, {"in_size": (n, n)})
    ]
    return first_that_runs(iter([*attempts, (make, (random(2, 64, 40),))]))


CLIPS = (
    "RN50",
    "ViT-S-32-alt",
    "ViT-M-32-alt",
    "coca_ViT-B-32",
    "convnext_tiny",
    "MobileCLIP-S1",
    "ViTamin-S",
    "PE-Core-T-16-384",
)


def open_clip_models() -> dict[str, Make]:
    """Return some of open_clip's architectures, made narrower."""
    return {name: partial(_clip, name) for name in CLIPS}


def _clip(name: str) -> tuple[nn.Module, Any]:
    import open_clip

    config = open_clip.get_model_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    text |= {"vocab_size": 64, "width": 64, "heads": 2, "layers": 2}
    narrow = {"layers": [1, 1, 1, 1] if name.startswith("RN") else 2, "width": 64, "head_width": 32, "image_size": 64}
    if "timm_model_name" not in vision:
        vision |= narrow
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {"width": 64, "heads": 2, "layers": 2, "vocab_size": 64}
    size = vision["image_size"]
    kind = (
        open_clip.CoCa
        if "multimodal_cfg" in config
        else open_clip.CustomTextCLIP
        if config.pop("custom_text", 0)
        else open_clip.CLIP
    )
    inputs = (random(2, 3, size, size), tokens(2, text.get("context_length", 77)))
    return first_that_runs(iter([(partial(kind, **config), inputs)]))


def ultralytics_models() -> dict[str, Make]:
    """Return every architecture of ultralytics, in the smallest size that its file has."""
    import ultralytics
    from ultralytics.nn import tasks

    files = [
        f
        for _, _, names in os.walk(os.path.join(os.path.dirname(ultralytics.__file__), "cfg", "models"))
        for f in names
    ]
    kinds = {
        "cls": tasks.ClassificationModel,
        "seg": tasks.SegmentationModel,
        "pose": tasks.PoseModel,
        "obb": tasks.OBBModel,
    }
    kinds |= {"world": tasks.WorldModel, "worldv2": tasks.WorldModel, "rtdetr": tasks.RTDETRDetectionModel}
    makes = {}
    for file in sorted(f for f in files if f.endswith(".yaml")):
        name = file.removesuffix(".yaml")
        parts = name.split("-")
        kind = next((kinds[part] for part in parts if part in kinds), tasks.DetectionModel)
        makes[name] = partial(_yolo, kind, file)
    return makes


def _yolo(kind: Callable[..., nn.Module], file: str) -> tuple[nn.Module, Any]:
    return first_that_runs(iter([(partial(kind, file, verbose=False), (random(2, 3, 64, 64),))]))


def segmentation_models() -> dict[str, Make]:
    """Return every architecture of segmentation-models-pytorch, each with two encoders."""
    import segmentation_models_pytorch as smp

    names = sorted(smp.MODEL_ARCHITECTURES_MAPPING)
    return {f"{name} {encoder}": partial(_segmentation, name, encoder) for name in names for encoder in ENCODERS}


ENCODERS = ("resnet18", "mobilenet_v2", "efficientnet-b0", "mit_b0", "timm-regnetx_002")


def _segmentation(name: str, encoder: str) -> tuple[nn.Module, Any]:
    import segmentation_models_pytorch as smp

    encoder = "tu-vit_tiny_patch16_224" if name == "dpt" else encoder
    make = partial(smp.create_model, name, encoder_name=encoder, encoder_weights=None)
    return first_that_runs((make, (random(2, 3, n, n),)) for n in (64, 224))


PACKAGES: dict[str, Callable[[], dict[str, Make]]] = {
    "transformers": transformers_models,
    "diffusers": diffusers_models,
    "torchrl": torchrl_models,
    "speechbrain": speechbrain_models,
    "vit-pytorch": vit_pytorch_models,
    "monai": monai_models,
    "pytorchcv": pytorchcv_models,
    "open_clip": open_clip_models,
    "ultralytics": ultralytics_models,
    "segmentation-models-pytorch": segmentation_models,
}
