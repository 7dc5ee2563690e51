"""Kernels: which masked layers compute with kept weights only in training, and how they do.

In training, convolutions along one or two dimensions and linear layers of torch.nn may run the native sums over kept weights
(`passes.kernels.products`) instead of torch's operations on the masked weight. Nothing that is saved depends on it.
"""

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from passes.capture.captured import Captured
from passes.capture.host import masked
from passes.capture.leaves import is_builtin
from passes.kernels.cache import lanes
from passes.kernels.compiler import native
from passes.kernels.costs import gain
from passes.kernels.products import convolve, linear
from passes.kernels.windows import Window
from passes.masking.mask import Mask, masks_of
from passes.masking.norms import with_whole_norms
from passes.masking.zeros import is_plain

KERNELS = ("auto", "masked", "sparse")


def use_kernels(model: nn.Module, kernels: str) -> nn.Module:
    """Choose what the masked layers of a model run in training, in place.

    Args:
        model: a masked model.
        kernels: "masked": torch's operations on masked weights. "sparse": sums over kept weights, wherever there are some: for
            torch.nn's convolutions along one or two dimensions and linear layers, in float32 on the CPU, without autocast and
            torch.func. "auto": these where a model of their cost says that they are faster, for the shapes at hand.

    Compressed parameters (`compress`) go on training with kept values only.

    Returns:
        The model.

    Raises:
        ValueError: `kernels` is none of these, or the model has no masks.

    Example:
        >>> from sparsify import sparsify
        >>> use_kernels(sparsify(nn.Linear(512, 512), 0.05), "auto")(torch.randn(64, 512)).shape
        torch.Size([64, 512])
    """
    if kernels not in KERNELS:
        raise ValueError(f"Unknown kernels {kernels!r}; known are {', '.join(KERNELS)}.")
    masks = masks_of(model)
    if not masks:
        raise ValueError("use_kernels takes a masked model, as sparsify() returns it.")
    for mask in masks.values():
        mask.kernels = "sparse" if mask.compressed else kernels
    for module in model.modules():
        if isinstance(module, Captured):
            module.fuse_in_training(None if kernels == "masked" else with_whole_norms)
    return model


def sparse_mask(module: nn.Module, input: Tensor) -> Mask | None:
    """Return the mask of a layer that is to run with kept weights only, on this input; None if it runs the masked weight."""
    mask = module._modules.get("weight_mask")
    if not isinstance(mask, Mask) or mask.kernels == "masked" or not (module.training or mask.compressed):
        return None
    weight = module._parameters.get("weight")
    if weight is None:  # a hook of torch.nn.utils has put a tensor in its place
        return None
    problem = _problem(module, input, weight)
    if problem:
        if mask.kernels == "sparse" and not torch.compiler.is_compiling():
            _say(f"kernels='sparse': {type(module).__name__} layers run the masked weight where {problem}.")
        return None
    if mask.kernels == "auto" and _gain(module, input, mask) <= 1:
        return None
    if mask.compressed:
        mask.check_places()
    return mask


@functools.cache
def _say(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def why_masked(module: Any) -> str:
    """Return why a layer runs the masked weight whatever its input is, or nothing."""
    if not is_builtin(module) or not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "they are no convolution or linear layer of torch.nn"
    weight: Any = module._parameters["weight"]
    if weight.device.type != "cpu":
        return "the device is not the CPU"
    if weight.dtype != torch.float32:
        return "numbers are not float32"
    if isinstance(module, nn.Linear):
        return ""
    if module.padding_mode != "zeros" or isinstance(module.padding, str) or isinstance(module, nn.Conv3d):
        return "a convolution pads other than by given numbers of zeros, or has three dimensions"
    return ""


def _problem(module: Any, input: Tensor, weight: Tensor) -> str:
    """Return why the sums cannot run, or nothing."""
    if why := why_masked(module):
        return why
    if input.device.type != "cpu":
        return "the device is not the CPU"
    if input.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return "numbers are not float32"
    if not input.numel():
        return "there is no input"
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and input.dim() != len(module.kernel_size) + 2:
        return "there is no batch"
    if torch.compiler.is_compiling():
        return ""
    if not is_plain(input) or not is_plain(weight) or torch.autograd.forward_ad._current_level >= 0:
        return "torch.func or forward-mode derivatives are at work"
    return "" if native() is not None else "there are no native loops"


@dataclass(frozen=True)
class Choice:
    """What a layer runs in training.

    Attributes:
        kernel: "sparse" or "masked".
        reason: why.
        predicted: how many times faster than dense sums over kept weights are, by the model; 0 where they cannot run.
    """

    kernel: str
    reason: str
    predicted: float


def choice_of(module: nn.Module, input: Tensor) -> Choice:
    """Return what a masked layer runs in training on an input, and why."""
    mask: Any = module._modules["weight_mask"]
    weight: Any = module._parameters["weight"]
    if problem := _problem(module, input, weight):
        return Choice("masked", problem, 0.0)
    predicted = _gain(module, input, mask)
    if mask.kernels == "masked":
        return Choice("masked", "kernels='masked'", predicted)
    if mask.kernels == "auto" and predicted <= 1:
        return Choice("masked", "sums over kept weights would not be faster", predicted)
    return Choice("sparse", "kernels='sparse'" if mask.kernels == "sparse" else "few weights are kept", predicted)


def _gain(module: Any, input: Tensor, mask: Mask) -> float:
    if isinstance(module, nn.Linear):
        shape, window = (1, input.shape[-1], 1, input.numel() // input.shape[-1]), Window()
    else:
        shape, window = tuple(_image(input).shape), _window(module)
    return gain(lanes(), shape, tuple(mask.mask.shape), mask.last_nonzeros, window)


def _image(input: Tensor) -> Tensor:
    return input.unsqueeze(2) if input.dim() == 3 else input


def _window(module: Any) -> Window:
    stride, padding, dilation = (
        (before, *value) if len(value) == 1 else tuple(value)
        for value, before in ((module.stride, 1), (module.padding, 0), (module.dilation, 1))
    )
    return Window(stride, padding, dilation, module.groups)


def sparse_convolution(module: Any, input: Tensor, mask: Mask) -> Tensor:
    """Return what a convolution computes with its kept weights."""
    result = convolve(
        _image(input), module._parameters["weight"], masked(module, "bias"), mask.mask, _window(module), mask.dense_gradient
    )
    return result.squeeze(2) if input.dim() == 3 else result


def sparse_linear(module: Any, input: Tensor, mask: Mask) -> Tensor:
    """Return what a linear layer computes with its kept weights."""
    return linear(input, module._parameters["weight"], masked(module, "bias"), mask.mask, mask.dense_gradient)
