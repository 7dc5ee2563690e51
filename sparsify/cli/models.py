"""Models by their names on the command line, and the inputs that they take."""

import difflib
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_TOKENS = 128  # of a text, unless told otherwise


def load_model(name: str, device: str = "meta") -> nn.Module:
    """Build a model by its name, without pretrained weights.

    Args:
        name: "resnet50" of torchvision; "timm:convnext_tiny"; "hf:PATH", a configuration of transformers on this machine, a
            file or its folder; or "package.module:factory".
        device: of a model that a library builds; on "meta" it needs no memory.

    Returns:
        The model.

    Raises:
        ValueError: there is no such model, or the factory does not return a module.
        ImportError: the library is not installed.
    """
    library, _, rest = name.partition(":")
    if library in _LIBRARIES and rest:
        return _LIBRARIES[library](rest, device)
    if rest:
        return _from_factory(library, rest)
    from torchvision import models

    _check_known("torchvision", name, models.list_models(), "Name your own as package.module:factory.")
    builder = models.get_model_builder(name)
    options = {"weights": None, "weights_backbone": None}
    options = {k: v for k, v in options.items() if k in inspect.signature(builder).parameters}
    with warnings.catch_warnings():  # GoogLeNet and Inception warn of their own initialization
        warnings.simplefilter("ignore", FutureWarning)
        return _built(lambda: builder(**options), device)


def model_names() -> list[str]:
    """Return the names of torchvision's models."""
    from torchvision import models

    return models.list_models()


def _check_known(library: str, name: str, known: Sequence[str], hint: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        raise ValueError(f"{library} has no model {name!r}. " + (f"Did you mean {', '.join(near)}?" if near else hint))


def _built(build: Callable[[], nn.Module], device: str) -> nn.Module:
    try:
        with torch.device(device):
            return build()
    except (RuntimeError, NotImplementedError):  # code that computes widths with tensors, which meta cannot hold
        with _WeightsOn(device):
            return build().to(device)


def _from_timm(name: str, device: str) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"timm:{name} needs timm: pip install timm") from error
    _check_known("timm", name, timm.list_models(), "timm.list_models() lists them.")
    return _built(lambda: timm.create_model(name), device)


def _from_transformers(path: str, device: str) -> nn.Module:
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise ImportError(f"hf:{path} needs transformers: pip install 'sparsify-fx[transformers]'") from error
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"hf:{path} is no configuration on this machine, a config.json or its folder: {reason}") from error
    return _built(lambda: AutoModel.from_config(config), device)


_LIBRARIES = {"timm": _from_timm, "hf": _from_transformers}


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


def inputs_of(model: nn.Module, shape: tuple[int, ...] | None = None) -> Any:
    """Return inputs that a model takes, as `flop_report` does: a shape, or the numbers of tokens of a text.

    Args:
        model: what `load_model` returned.
        shape: of the input; None: of one image, of one video for models that convolve in three dimensions, of one text.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "vocab_size") and hasattr(model, "get_input_embeddings"):
        return {"input_ids": torch.zeros(shape or (1, _TOKENS), dtype=torch.long)}
    if shape:
        return shape
    size: Any = getattr(config, "image_size", None)
    if isinstance(size, int):
        return (1, getattr(config, "num_channels", 3), size, size)
    if timm_size := getattr(model, "default_cfg", {}).get("input_size"):
        return (1, *timm_size)
    video = any(isinstance(module, nn.Conv3d) for module in model.modules())
    return (1, 3, 16, 224, 224) if video else (1, 3, 224, 224)
