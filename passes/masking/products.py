"""Products: what a layer or a node of a graph computes with kept weights only, where it does."""

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from passes.capture.host import masked
from passes.capture.leaves import CONV_FORWARDS, is_builtin
from passes.kernels.cache import lanes
from passes.kernels.compiler import native
from passes.kernels.products import convolve, linear
from passes.kernels.training_costs import TrainingCycles, training_cycles
from passes.kernels.windows import Window, with_pixels
from passes.masking.mask import Mask
from passes.masking.zeros import is_plain

SIDES = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}  # what convolutions get besides, and what these are by default


def sparse_layer(module: Any, x: Tensor) -> Tensor | None:
    """Return what a layer of torch.nn computes with its kept weights only; None if it is to run the masked weight."""
    mask, weight = module._modules.get("weight_mask"), module._parameters.get("weight")
    if not isinstance(mask, Mask) or weight is None or not may_run(mask):  # hooks may have put a tensor in its place
        return None
    return sparse_product(mask, x, weight, masked(module, "bias"), _sides(module), type(module).__name__, _own_code(module))


def may_run(mask: Mask) -> bool:
    """Whether products with a weight may be of its kept values only, as it is used now."""
    return mask.kernels != "masked" and (mask.training or mask.compressed)


def sparse_product(
    mask: Mask, x: Tensor, weight: Tensor, bias: Any, sides: Sequence[Any], name: str, problem: str = ""
) -> Tensor | None:
    """Return a product with kept weights only; None if the masked weight is to be multiplied.

    Args:
        mask: of the weight, which `may_run`.
        x: what it is multiplied with.
        weight: the parameter, whole or compressed.
        bias: a tensor or None.
        sides: stride, padding, dilation and groups of a convolution; nothing for a linear layer.
        name: of the layer or function.
        problem: why it cannot be, if that is known.
    """
    problem = problem or _problem(mask, x, weight, bias, sides)
    if problem:
        if mask.kernels == "sparse" and not torch.compiler.is_compiling():
            _say(f"kernels='sparse': {name} layers run the masked weight where {problem}.")
        return None
    if mask.kernels == "auto" and not _pays(_cycles(mask, x, sides)):
        return None
    if mask.compressed:
        mask.check_places()
    if not sides:
        return linear(x, weight, bias, mask.mask, mask.dense_gradient)
    result = convolve(_image(x), weight, bias, mask.mask, _window(x, *sides), mask.dense_gradient)
    return result.squeeze(2) if x.dim() == 3 else result


@functools.cache
def _say(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def why_masked(module: Any) -> str:
    """Return why a layer runs the masked weight whatever its input is, or nothing."""
    return _own_code(module) or _why_masked(module._parameters["weight"], _sides(module))


def _own_code(module: Any) -> str:
    """Return why what a layer runs is none of the functions that the sums compute, or nothing."""
    if not is_builtin(module) or not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        return "they are no linear layer, or convolution along one or two dimensions, of torch.nn"
    if isinstance(module, nn.Linear):
        return ""
    if module.padding_mode != "zeros":
        return "a convolution pads with other numbers than zeros"
    if type(module)._conv_forward not in CONV_FORWARDS:
        return "_conv_forward is not torch's"
    return ""


def _why_masked(weight: Any, sides: Sequence[Any]) -> str:
    if weight.device.type != "cpu":
        return "the device is not the CPU"
    if weight.dtype != torch.float32:
        return "numbers are not float32"
    return "a convolution pads other than by given numbers" if sides and isinstance(sides[1], str) else ""


def _problem(mask: Mask, x: Tensor, weight: Tensor, bias: Any, sides: Sequence[Any]) -> str:
    """Return why the sums cannot run, or nothing; what does not fit together is left to torch, which says so."""
    if why := _why_masked(weight, sides):
        return why
    if x.device.type != "cpu":
        return "the device is not the CPU"
    if mask.mask.numel() >= 2**31:
        return "a weight has 2**31 elements or more"
    if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return "numbers are not float32"
    if not x.numel():
        return "there is no input"
    if sides and x.dim() != mask.mask.dim():
        return "there is no batch"
    if not _fits(mask, x, weight, bias, sides):
        return "shapes do not fit"
    if torch.compiler.is_compiling():
        return ""
    given = (x, weight) if bias is None else (x, weight, bias)
    if not all(map(is_plain, given)) or torch.autograd.forward_ad._current_level >= 0:
        return "torch.func or forward-mode derivatives are at work"
    return "" if native() is not None else "there are no native loops"


def _fits(mask: Mask, x: Tensor, weight: Tensor, bias: Any, sides: Sequence[Any]) -> bool:
    """Whether an input, a weight and a bias have the shapes and formats of a layer that has this mask."""
    outputs, inputs, *_ = mask.mask.shape
    if weight.shape != mask.mask.shape and not (mask.compressed and weight.shape[1:] == (1,)):
        return False
    if bias is not None and (bias.shape != (outputs,) or bias.dtype != x.dtype or bias.device != x.device):
        return False
    if not sides:
        return x.dim() > 0 and x.shape[-1] == inputs
    image, window = _image(x), _window(x, *sides)
    fitting = x.shape[1] == inputs * window.groups and outputs % window.groups == 0
    return fitting and min(window.out(image.shape, with_pixels(mask.mask.shape))) > 0


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


def choice_of(module: nn.Module, x: Tensor) -> Choice:
    """Return what a masked layer of torch.nn runs in training on an input, and why."""
    mask: Any = module._modules["weight_mask"]
    weight: Any = module._parameters["weight"]
    if problem := _own_code(module) or _problem(mask, x, weight, masked(module, "bias"), _sides(module)):
        return Choice("masked", problem, 0.0)
    cycles = _cycles(mask, x, _sides(module))
    predicted = cycles.dense / cycles.sparse
    if mask.kernels == "masked":
        return Choice("masked", "kernels='masked'", predicted)
    if mask.kernels == "auto" and not _pays(cycles):
        return Choice("masked", "sums over kept weights would not be faster", predicted)
    return Choice("sparse", "kernels='sparse'" if mask.kernels == "sparse" else "few weights are kept", predicted)


def _sides(module: Any) -> tuple[Any, ...]:
    return () if isinstance(module, nn.Linear) else (module.stride, module.padding, module.dilation, module.groups)


def _cycles(mask: Mask, x: Tensor, sides: Sequence[Any]) -> TrainingCycles:
    shape = tuple(_image(x).shape) if sides else (1, x.shape[-1], 1, x.numel() // x.shape[-1])
    window = _window(x, *sides) if sides else Window()
    return training_cycles(lanes(), shape, tuple(mask.mask.shape), mask.last_nonzeros, window)


def _pays(cycles: TrainingCycles) -> bool:
    """Whether sums over kept weights are faster than what runs otherwise."""
    return cycles.sparse < cycles.masked


def _image(x: Tensor) -> Tensor:
    return x.unsqueeze(2) if x.dim() == 3 else x


def _window(x: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Window:
    """Return what a convolution along one or two dimensions looks at, of rows and of columns."""
    pairs = [(v, v) if isinstance(v, int) else (v[0], v[-1]) for v in (stride, padding, dilation)]
    if x.dim() == 3:
        pairs = [(row, columns) for row, (_, columns) in zip((1, 0, 1), pairs, strict=True)]
    stride, padding, dilation = pairs
    return Window(stride, padding, dilation, groups)
