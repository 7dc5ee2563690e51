"""Lookup: the sparse models inside a module."""

from typing import Any

from torch import nn

from sparsify.training.base import UpdaterBase


def updater_of(model: nn.Module) -> UpdaterBase | None:
    """Return the updater of a model that `sparsify` returned, None of any other."""
    found = model._modules.get("updater")
    return found if isinstance(found, UpdaterBase) else None


def updaters_of(module: nn.Module) -> dict[str, UpdaterBase]:
    """Return the updater of every sparsified model inside a module, itself included, by the path of the model."""
    return {path: found for path, child in module.named_modules() if (found := updater_of(child))}


def sparse_models(module: nn.Module) -> dict[str, UpdaterBase]:
    """Return what `updaters_of` does, of a module that is to be trained sparsely.

    Raises:
        ValueError: there is none.
    """
    if found := updaters_of(module):
        return found
    raise ValueError(f"{type(module).__name__} has no sparse model inside: call sparsify() on it, or on a part of it, first.")


def where_sparse(model: Any) -> str:
    """Say for an error where the sparse model is, if it is not this one."""
    inside = list(updaters_of(model)) if isinstance(model, nn.Module) else []
    if inside:
        return f"it is inside this {type(model).__name__}, at {inside[0]!r}"
    return f"this {type(model).__name__} has no masks of its own"
