"""The architectures of transformers, small and without weights, found in its own registry; and faults that are not ours.

What does not run with a small configuration is tried again with a larger one, with fewer inputs, or without its head.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from foreign_attempts import Make, first_success, refuse_large, run
from foreign_configs import LAYERS, MEDIUM, SMALL, configuration
from foreign_inputs import candidates, with_image_tokens
from torch import nn

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

# {pattern of "package/model": why a failure is not this library's}
FAULTS = {
    "transformers/levit": "the model's: it caches a bias with its graph in evaluation; a second backward fails, dense too",
    "transformers/timm_wrapper": "the model's: its load_state_dict renames every key that is not its own",
    "torchrl/VDNMixer": "nobody's: it has no weights",
    "speechbrain/.*(VanillaNN|Linear).*": "the model's: it assigns weight.data, which no mask can follow",
}

# The first mapping that knows a model says which class is built: with a head where that is usual, for it is what is trained.
MAPPINGS = "SPEECH_SEQ_2_SEQ SEQ_TO_SEQ_CAUSAL_LM MASKED_LM CAUSAL_LM IMAGE_CLASSIFICATION CTC".split()


def transformers_models() -> dict[str, Make]:
    """Return how to make each architecture that transformers registers: its model and inputs that it takes."""
    names = {name for mapping in _mappings().values() for name in mapping}
    return {name: partial(_make, name) for name in sorted(names)}


def _mappings() -> dict[str, dict[str, Any]]:
    """Return transformers' mappings of model names to classes, those of usual heads first."""
    from transformers.models.auto import modeling_auto as auto

    first = [f"MODEL_FOR_{mapping}_MAPPING_NAMES" for mapping in MAPPINGS] + ["MODEL_MAPPING_NAMES"]
    rest = [name for name in dir(auto) if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES")]
    return {name: getattr(auto, name) for name in (*first, *rest)}


def _make(name: str) -> tuple[nn.Module, Any]:
    """Try classes and sizes until a model runs."""
    sizes = (SMALL, MEDIUM, LAYERS)
    return first_success(partial(_build, cls, name, numbers) for cls in _classes(name) for numbers in sizes)


def _classes(name: str) -> list[type[nn.Module]]:
    """Return the classes of a model: with its usual head, and without one."""
    import transformers

    found = [mapping[name] for mapping in _mappings().values() if name in mapping]
    names = [cls if isinstance(cls, str) else cls[0] for cls in found]
    return [getattr(transformers, cls) for cls in dict.fromkeys(names) if hasattr(transformers, cls)][:2]


def _build(cls: type[nn.Module], name: str, numbers: tuple[tuple[str, int], ...]) -> tuple[nn.Module, dict[str, Any]]:
    """Build a model, and find inputs that it runs on."""
    config = configuration(name, numbers)
    with torch.device("meta"):
        refuse_large(cls(config))
    torch.manual_seed(0)
    model = cls(config).float().eval()
    return first_success(_runs(model))


def _runs(model: nn.Module) -> Iterator[Callable[[], tuple[nn.Module, dict[str, Any]]]]:
    return (partial(_with_inputs, model, make) for make in candidates(model))


def _with_inputs(model: nn.Module, make: Callable[[], dict[str, Any]]) -> tuple[nn.Module, dict[str, Any]]:
    inputs = make()
    try:
        run(model, inputs)
    except ValueError as error:
        inputs = with_image_tokens(inputs, model.config, error)
        run(model, inputs)
    return model, inputs
