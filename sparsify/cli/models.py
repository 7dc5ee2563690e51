"""Models by their names on the command line."""

import difflib
import importlib
import inspect
import sys
import warnings
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


def load_model(name: str, device: str = "meta") -> nn.Module:
    """Build a torchvision model by its name, or call a user's factory.

    Args:
        name: "resnet50", or "package.module:factory".
        device: of a torchvision model; on "meta" it needs no memory.

    Returns:
        The model, without pretrained weights.

    Raises:
        ValueError: there is no such model, or the factory does not return a module.
    """
    if ":" in name:
        return _from_factory(*name.split(":", 1))
    from torchvision import models

    known = models.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"Did you mean {', '.join(near)}?" if near else "Name your own as package.module:factory."
        raise ValueError(f"torchvision has no model {name!r}. {hint}")
    builder = models.get_model_builder(name)
    options = {"weights": None, "weights_backbone": None}
    options = {k: v for k, v in options.items() if k in inspect.signature(builder).parameters}
    with warnings.catch_warnings():  # GoogLeNet and Inception warn of their own initialization
        warnings.simplefilter("ignore", FutureWarning)
        try:
            with torch.device(device):
                return builder(**options)
        except (RuntimeError, NotImplementedError):  # regnets compute widths with tensors, which meta cannot hold
            with _WeightsOn(device):
                return builder(**options).to(device)


class _WeightsOn(TorchFunctionMode):
    """Put new weights on a device, and leave all other new tensors alone, unlike `torch.device`."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": self.device} if func is torch.empty else {})})


def _from_factory(module: str, factory: str) -> nn.Module:
    sys.path.insert(0, "")  # as `python -m` does, so that a module in the current folder is found
    try:
        model = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError, TypeError) as error:
        hint = f" Write {module.removesuffix('.py')}:{factory}." if module.endswith(".py") else ""
        raise ValueError(f"Cannot load {module}:{factory}, which is called without arguments: {error}.{hint}") from error
    finally:
        sys.path.remove("")
    if not isinstance(model, nn.Module):
        raise ValueError(f"{module}:{factory} returned {type(model).__name__}, not a torch.nn.Module.")
    return model


def default_shape(model: nn.Module) -> tuple[int, ...]:
    """Return the shape of one input: of a video for models that convolve in three dimensions, else of an image."""
    video = any(isinstance(module, nn.Conv3d) for module in model.modules())
    return (1, 3, 16, 224, 224) if video else (1, 3, 224, 224)
