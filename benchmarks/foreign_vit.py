"""The classifiers of vit-pytorch, small, found in its modules: arguments are filled in by their names."""

import importlib
import inspect
import pkgutil
from functools import partial
from typing import Any

from foreign_attempts import Make, classes, filled, first_that_runs, random
from torch import nn

Values = dict[str, Any]

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
        for name, cls in classes(importlib.import_module(f"vit_pytorch.{info.name}")).items():
            if cls.__module__.endswith(info.name) and "num_classes" in inspect.signature(cls).parameters:
                makes[f"{info.name}.{name}"] = partial(_vit, cls)
    return makes


def _vit(cls: type[nn.Module]) -> tuple[nn.Module, Any]:
    images = (random(2, 3, 64, 64),), (random(2, 3, 4, 64, 64),), (random(2, 3, 64),), ([random(3, 64, 64)] * 2,)
    ways = filled(cls, FLAT, STAGED, STEMMED)
    return first_that_runs((make, inputs) for make in ways for inputs in images)
