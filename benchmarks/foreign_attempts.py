"""Making a model and its inputs by trying: the first that runs counts."""

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

LARGEST = 30_000_000  # parameters; more take too long to check

Result = TypeVar("Result")
Make = Callable[[], tuple[nn.Module, Any]]
Listed = dict[str, tuple[dict[str, Any], Any]]  # {class: (arguments, inputs)}


def first_success(attempts: Iterable[Callable[[], Result]]) -> Result:
    """Return what the first attempt without an error returns; raise the first error if there is none."""
    first: Exception | None = None
    for attempt in attempts:
        try:
            return attempt()
        except Exception as error:  # anybody's code, and any error means the same: not this way
            first = first or error
    raise first or ValueError("nothing to try")


def first_that_runs(attempts: Iterable[tuple[Callable[[], nn.Module], Any]]) -> tuple[nn.Module, Any]:
    """Return the first model that runs on its inputs, and these."""
    return first_success(partial(_built, make, inputs) for make, inputs in attempts)


def _built(make: Callable[[], nn.Module], inputs: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = make().eval()
    refuse_large(model)
    run(model, inputs)
    return model, inputs


def run(model: nn.Module, inputs: Any) -> None:
    """Run a model once, on keyword arguments or positional ones."""
    with torch.no_grad():
        model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def refuse_large(model: nn.Module) -> None:
    """Raise if a model has too many parameters to be checked in time; lazy ones have none yet."""
    size = sum(p.numel() for p in model.parameters() if not isinstance(p, nn.UninitializedParameter))
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters")


def filled(cls: type[nn.Module], *choices: dict[str, Any]) -> Iterator[Callable[[], nn.Module]]:
    """Yield ways to call a class: with those of each choice's values that it, or where it passes them on its base, takes."""
    parameters = inspect.signature(cls).parameters
    passed_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    base = {*inspect.signature(cls.__base__).parameters} - {"block"} if passed_on and cls.__base__ else set()
    names = {*parameters, *base}
    for values in choices:
        yield partial(cls, **{name: value for name, value in values.items() if name in names})


def listed_makes(module: str, listed: Listed) -> dict[str, Make]:
    """Return how to make each listed class of a module; words after its name tell apart those that are listed twice."""
    return {name: partial(_listed, module, name, *listed[name]) for name in listed}


def _listed(module: str, name: str, arguments: dict[str, Any], inputs: Any) -> tuple[nn.Module, Any]:
    folder, _, cls = name.split(" ")[0].rpartition(".")
    found = getattr(importlib.import_module(f"{module}.{folder}".rstrip(".")), cls)
    return first_that_runs([(partial(found, **arguments), inputs)])


def classes(module: ModuleType) -> dict[str, type[nn.Module]]:
    """Return a module's own network classes."""
    found = {name: cls for name, cls in vars(module).items() if inspect.isclass(cls) and issubclass(cls, nn.Module)}
    return {name: cls for name, cls in found.items() if cls.__name__ == name and not name.startswith("_")}


def random(*shape: int) -> Tensor:
    """Return random numbers, the same ones in every process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tokens(*shape: int) -> Tensor:
    """Return random tokens of a small vocabulary."""
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(0))
