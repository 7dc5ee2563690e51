"""Models for tests: small nets that show one thing each, and torchvision's zoo."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchvision import models


class SmallNet(nn.Module):
    """Two convs, a norm and a classifier: enough for every training test."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv1(x)).relu()
        return self.fc(self.conv2(x).relu().mean((2, 3)))


class Functional(nn.Module):
    """Weights that are read by functions, through views, twice, and from one parameter by two consumers."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.matrix = nn.Parameter(torch.randn(8, 6))
        self.shared = nn.Linear(6, 6)
        self.table = nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel) + self.table
        x = x.mean((2, 3)) @ self.matrix
        x = self.shared(self.shared(x))
        return x @ self.matrix.t()


ZOO = models.list_models()  # quantized names in their float form
PYTHON_AT_THE_ROOT = ("rcnn", "retinanet", "fcos", "ssd", "raft")  # 14 detectors and flow networks
PARTS = [name for name in ZOO if any(part in name for part in PYTHON_AT_THE_ROOT)]
WHOLE = [name for name in ZOO if name not in PARTS]


def size(name: str) -> int:
    """Return how many parameters a torchvision model has, as its published weights say."""
    return next((w.meta["num_params"] for w in models.get_model_weights(name)), 10**9)


# The smallest model of each of torchvision's files, quantized ones apart: these run on values, the others on shapes.
FAMILIES = [models.get_model_builder(name).__module__ for name in ZOO]
SMALLEST = {min((n for n, f in zip(ZOO, FAMILIES, strict=True) if f == family), key=size) for family in FAMILIES}
LARGE_TO_TRAIN = 12_000_000  # parameters
SMALLEST -= {"mvit_v2_s", "s3d", "maxvit_t"}  # which take nothing smaller than 16 frames of 224 x 224, or take long


def swept(names: list[str], sampled: set[str] = SMALLEST) -> list[Any]:
    """Return names as parameters of a test that the gate runs for the smallest model of a family, `make sweep` for all."""
    return [name if name in sampled else pytest.param(name, marks=pytest.mark.sweep) for name in names]


def input_shape(name: str, small: bool = False) -> tuple[int, ...]:
    """Return an input shape that a torchvision model takes: its usual one, or a small one where the model allows it."""
    fixed = any(part in name for part in ("vit_", "maxvit", "mvit", "s3d", "inception"))
    if any(part in name for part in ("r3d", "mc3", "r2plus1d", "s3d", "mvit", "swin3d")):
        return (
            (1, 3, 16, 224, 224)
            if fixed or ("swin3d" in name and not small)
            else (1, 3, 8, 64, 64)
            if small
            else (1, 3, 16, 112, 112)
        )
    size = 299 if "inception" in name else 224 if fixed or not small else 64
    return (1, 3, size, size)


def training_loss(name: str, model: nn.Module, device: str) -> Tensor:
    """Run one training forward of a torchvision model on small random inputs."""
    generator = torch.Generator().manual_seed(0)
    if name in WHOLE:
        shape = input_shape(name, small=True)
        result = model(torch.rand(2, *shape[1:], generator=generator).to(device))
    elif "raft" in name:
        result = model(*(torch.rand(1, 3, 128, 128, generator=generator).to(device) for _ in range(2)), 2)
    else:
        model.get_submodule("transform").min_size = model.get_submodule("transform").max_size = (128,)
        transform = model.get_submodule("transform")
        transform.min_size, transform.max_size = (128,), 128
        if "rcnn" in name:  # fewer regions, for speed
            model.get_submodule("roi_heads").fg_bg_sampler.batch_size_per_image = 8
        target = {"boxes": torch.tensor([[10.0, 10.0, 90.0, 90.0]]), "labels": torch.tensor([1])}
        target |= {"masks": torch.ones(1, 128, 128), "keypoints": torch.ones(1, 17, 3)}
        result = model([torch.rand(3, 128, 128, generator=generator) for _ in range(2)], [target, target])
    tensors = pytree.tree_leaves(tuple(result) if isinstance(result, tuple) else result)
    return torch.stack([t.float().square().mean() for t in tensors if isinstance(t, Tensor)]).sum()
