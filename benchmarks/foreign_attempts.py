"""Making a model and its inputs by trying: the first that runs counts."""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from foreign_models import LARGEST
from torch import Tensor, nn


def random(*shape: int) -> Tensor:
    """Return random numbers, the same ones in every process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tokens(*shape: int) -> Tensor:
    """Return random tokens of a small vocabulary."""
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(0))


def first_that_runs(attempts: Iterator[tuple[Callable[[], nn.Module], Any]]) -> tuple[nn.Module, Any]:
    """Return the first model that runs on its inputs; raise the first error if none does."""
    first: Exception | None = None
    for make, inputs in attempts:
        torch.manual_seed(0)
        try:
            model = make().eval()
            refuse_large(model)
            with torch.no_grad():
                model(**inputs) if isinstance(inputs, dict) else model(*inputs)
            return model, inputs
        except Exception as error:  # anybody's code, and any error means the same: not this way
            first = first or error
    raise first or ValueError("nothing to try")


def refuse_large(model: nn.Module) -> None:
    """Raise if a model has too many parameters to be checked in time; lazy ones have none yet."""
    size = sum(p.numel() for p in model.parameters() if not isinstance(p, nn.UninitializedParameter))
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters")


def filled(cls: type[nn.Module], *choices: dict[str, Any]) -> Iterator[Callable[[], nn.Module]]:
    """Yield ways to call a class: with those of each choice's values that it takes."""
    parameters = inspect.signature(cls).parameters
    kinds = {p.kind for p in parameters.values()}
    base = inspect.signature(cls.__base__).parameters if inspect.Parameter.VAR_KEYWORD in kinds else {}
    names = {*parameters, *base} - ({"block"} if base else set())
    for values in choices:
        yield partial(cls, **{name: value for name, value in values.items() if name in names})
