"""Checkpoints: everything that training needs to go on exactly, in one file that is never half-written."""

import collections
import copy
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from passes.shards import is_sharded
from sparsify.saving.files import replacing

_RNG, _LOADED = "rng", "loaded"
_OWN = {_RNG, _LOADED}


def save_checkpoint(path: str | os.PathLike[str], **parts: Any) -> None:
    """Write what training needs to go on: parts with a `state_dict`, plain values, and the state of torch's generators.

    The model's `state_dict` holds masks, step, schedule and history, so training that goes on from the file does bit for
    bit what it would have done. A process that is killed at any moment leaves the file before or the file after. Under DDP
    one rank saves and all load; the generators' state is that of the rank that saved, and goes to no other. Under FSDP use
    torch.distributed.checkpoint.

    Args:
        path: of the file; its folder exists.
        **parts: model, optimizer, scheduler, scaler, ... with `state_dict()`; numbers, text, tensors, and lists or dicts of
            them as they are.

    Raises:
        ValueError: a part holds something else, is sharded over ranks, or has a name that the file needs; nothing is written.
        OSError: the file cannot be written; one that was there is left as it was.

    Example:
        >>> import tempfile
        >>> from sparsify import load_checkpoint, sparsify
        >>> path = Path(tempfile.mkdtemp()) / "run.pt"
        >>> model = sparsify(torch.nn.Sequential(torch.nn.Linear(8, 8)), density=0.5)
        >>> load_checkpoint(path, model=model) is None  # there is none yet
        True
        >>> save_checkpoint(path, model=model, epoch=3)
        >>> load_checkpoint(path, model=model)
        {'epoch': 3}
    """
    if taken := parts.keys() & _OWN:
        raise ValueError(f"{min(taken)!r} is a name that a checkpoint needs for itself; give the part another name.")
    if not parts:
        raise ValueError("There is nothing to save: save_checkpoint(path, model=model, optimizer=optimizer, epoch=3).")
    state = {name: part.state_dict() if _has_state(part) else part for name, part in parts.items()}
    for name, value in state.items():
        _check_plain(name, value)
    generators = {"cpu": torch.get_rng_state(), "rank": _rank()}
    if torch.cuda.is_initialized():
        generators["cuda"] = torch.cuda.get_rng_state()
    with replacing(path) as partial:
        torch.save({**state, _RNG: generators, _LOADED: [k for k, part in parts.items() if _has_state(part)]}, partial)


def load_checkpoint(path: str | os.PathLike[str], **parts: Any) -> dict[str, Any] | None:
    """Take over what `save_checkpoint` wrote.

    Args:
        path: of the file; its tensors are loaded to the CPU and copied to where the parts have theirs.
        **parts: what has a `load_state_dict`, by the names it was saved under. Attach the updater before or after.

    Returns:
        The plain values of the file, or None where there is no file: training starts from the beginning.

    Raises:
        ValueError: the file is damaged or something else, holds other parts than are asked for, or a part does not fit;
            nothing was changed.
    """
    if not Path(path).exists():
        return None
    state = _read(path)
    generators, loaded = state.pop(_RNG), state.pop(_LOADED)
    if set(loaded) != set(parts):
        raise ValueError(
            f"{path} holds the parts {', '.join(loaded)}; asked for was {', '.join(parts) or 'none'}. Name the same parts as "
            f"in save_checkpoint(); to read one alone, torch.load(path) has their state_dicts by name."
        )
    before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    for name, part in parts.items():
        try:
            part.load_state_dict(state.pop(name))
        except Exception as error:  # a part may raise anything
            for other, kept in before.items():
                parts[other].load_state_dict(kept)
            raise ValueError(
                f"{path} does not fit the {type(parts[name]).__name__} {name!r}, and nothing was changed: "
                f"{type(error).__name__}: {error}"
            ) from error
    if generators["rank"] == _rank():
        torch.set_rng_state(generators["cpu"].cpu())
        if "cuda" in generators and torch.cuda.is_available():
            torch.cuda.set_rng_state(generators["cuda"].cpu())
    return state


def _has_state(part: Any) -> bool:
    return callable(getattr(part, "state_dict", None))


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, KeyError, ValueError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else ""  # further lines are advice to trust the file
        raise ValueError(f"{path} is not a checkpoint, or is damaged: {type(error).__name__}: {reason}") from error
    if not isinstance(state, dict) or not state.keys() >= _OWN:
        raise ValueError(f"{path} was not written by save_checkpoint(). Read it with torch.load() and load_state_dict().")
    return state


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


_VALUES = (torch.Tensor, nn.Parameter, bool, int, float, complex, str, bytes, type(None))
_MAPPINGS, _SEQUENCES = (dict, collections.OrderedDict, collections.Counter), (list, tuple, set, torch.Size)


def _check_plain(name: str, value: Any) -> None:
    """Raise unless a value can be read without running code from the file; what inherits from plain types cannot."""
    if type(value) in _MAPPINGS:
        for key, item in value.items():
            _check_plain(f"the key {key!r} of {name}", key)
            _check_plain(f"{name}[{key!r}]", item)
    elif type(value) in _SEQUENCES:
        for i, item in enumerate(value):
            _check_plain(f"{name}[{i}]", item)
    elif is_sharded(value):
        raise ValueError(f"{name} is sharded over ranks. Save it with torch.distributed.checkpoint.")
    elif type(value) not in _VALUES:
        raise ValueError(f"{name} is a {type(value).__name__}; a checkpoint holds tensors, numbers and text. Convert it first.")
