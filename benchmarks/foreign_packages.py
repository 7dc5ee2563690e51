"""Every package whose models are checked; and those of packages that need few words: all small, without weights."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from foreign_attempts import Make, first_that_runs, random, tokens
from foreign_diffusers import diffusers_models
from foreign_models import transformers_models
from foreign_monai import monai_models
from foreign_speechbrain import speechbrain_models
from foreign_torchrl import torchrl_models
from foreign_vit import vit_pytorch_models
from torch import nn

os.environ |= {"YOLO_CONFIG_DIR": "/tmp", "YOLO_VERBOSE": "false", "YOLO_OFFLINE": "true"}


def pytorchcv_models() -> dict[str, Make]:
    """Return one model of each family of pytorchcv, the first that it registers."""
    from pytorchcv import model_provider

    first = {make.__module__: (name, make) for name, make in reversed(model_provider._models.items())}
    return {name: partial(_pytorchcv, make) for name, make in sorted(first.values())}


def _pytorchcv(make: Callable[..., nn.Module]) -> tuple[nn.Module, Any]:
    """Try small images first; some networks are built for one size."""
    ways = ((partial(make, **own), n) for n in (32, 64, 96, 128, 224, 320) for own in ({}, {"in_size": (n, n)}))
    return first_that_runs((way, (random(2, 3, n, n),)) for way, n in ways)


CLIPS = "RN50 ViT-S-32-alt ViT-M-32-alt coca_ViT-B-32 convnext_tiny MobileCLIP-S1 ViTamin-S PE-Core-T-16-384".split()


def open_clip_models() -> dict[str, Make]:
    """Return some of open_clip's architectures, made narrower."""
    return {name: partial(_clip, name) for name in CLIPS}


def _clip(name: str) -> tuple[nn.Module, Any]:
    import open_clip

    config, narrow = open_clip.get_model_config(name), {"width": 64, "heads": 2, "layers": 2, "vocab_size": 64}
    config["embed_dim"] = 64
    custom, vision, text = config.pop("custom_text", False), config["vision_cfg"], config["text_cfg"]
    text |= narrow
    if "timm_model_name" not in vision:
        layers = [1, 1, 1, 1] if isinstance(vision["layers"], list) else 2
        vision |= {"layers": layers, "width": 64, "head_width": 32, "image_size": 64}
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    if "multimodal_cfg" in config:
        kind = open_clip.CoCa
        config["multimodal_cfg"] |= narrow
    size = vision["image_size"]
    inputs = (random(2, 3, size, size), tokens(2, text.get("context_length", 77)))
    return first_that_runs([(partial(kind, **config), inputs)])


def ultralytics_models() -> dict[str, Make]:
    """Return every architecture of ultralytics, in the smallest size that its file has."""
    import ultralytics

    files = sorted((Path(ultralytics.__file__).parent / "cfg" / "models").rglob("*.yaml"))
    return {file.stem: partial(_yolo, file.name) for file in files}


YOLO = {
    "cls": "Classification",
    "seg": "Segmentation",
    "pose": "Pose",
    "obb": "OBB",
    "world": "World",
    "worldv2": "World",
}
YOLO |= {"rtdetr": "RTDETRDetection"}


def _yolo(file: str) -> tuple[nn.Module, Any]:
    from ultralytics.nn import tasks

    words = file.removesuffix(".yaml").split("-")
    kind = getattr(tasks, next((YOLO[word] for word in words if word in YOLO), "Detection") + "Model")
    return first_that_runs([(partial(kind, file, verbose=False), (random(2, 3, 64, 64),))])


ENCODERS = "resnet18 mobilenet_v2 efficientnet-b0 mit_b0 timm-regnetx_002".split()


def segmentation_models() -> dict[str, Make]:
    """Return every architecture of segmentation-models-pytorch, with each of some small encoders that it takes."""
    import segmentation_models_pytorch as smp

    pairs = [(name, encoder) for name in smp.MODEL_ARCHITECTURES_MAPPING if name != "dpt" for encoder in ENCODERS]
    pairs += [("dpt", "tu-vit_tiny_patch16_224")]
    return {" ".join(pair): partial(_segmentation, *pair) for pair in pairs}


def _segmentation(name: str, encoder: str) -> tuple[nn.Module, Any]:
    import segmentation_models_pytorch as smp

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
