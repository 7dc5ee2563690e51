"""Checkpoints: everything that training needs to go on exactly, in one file that is never half-written."""

import os
from pathlib import Path
from typing import Any

import torch

from sparsify.files import replacing

_RNG = "rng"


def save_checkpoint(path: str | os.PathLike[str], **parts: Any) -> None:
    """Write what training needs to go on: whatever has a `state_dict`, plain values, and the state of torch's generators.

    The model's `state_dict` holds masks, step, schedule and history, so training that goes on from the file does bit for
    bit what it would have done. A process that is killed at any moment leaves the file before or the file after. Under DDP
    one rank saves; under FSDP use torch.distributed.checkpoint.

    Args:
        path: of the file; its folder exists.
        **parts: model, optimizer, scheduler, scaler, ... with `state_dict()`; numbers, text and tensors as they are.

    Raises:
        ValueError: a part is named "rng", which is taken.
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
    if _RNG in parts:
        raise ValueError(f"{_RNG!r} is the name of the generators' state in a checkpoint; give the part another name.")
    state = {name: part.state_dict() if _has_state(part) else part for name, part in parts.items()}
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        generators["cuda"] = torch.cuda.get_rng_state()
    with replacing(path) as partial:
        torch.save({**state, _RNG: generators}, partial)


def load_checkpoint(path: str | os.PathLike[str], *, map_location: Any = "cpu", **parts: Any) -> dict[str, Any] | None:
    """Take over what `save_checkpoint` wrote.

    Args:
        path: of the file.
        map_location: where tensors are loaded before they are copied.
        **parts: what has a `load_state_dict`, by the names it was saved under. Attach the updater before or after.

    Returns:
        The plain values of the file, or None where there is no file: training starts from the beginning.

    Raises:
        ValueError: the file lacks a part that is asked for, or holds one that is not, or a part does not fit.
    """
    if not Path(path).exists():
        return None
    state = torch.load(path, map_location=map_location, weights_only=True)
    generators = state.pop(_RNG)
    missing = [name for name in parts if name not in state]
    left = [name for name, value in state.items() if isinstance(value, dict) and name not in parts]
    if missing or left:
        raise ValueError(
            f"{path} holds {', '.join(state)}; asked for was {', '.join(parts)}. Name the same parts as in save_checkpoint()."
        )
    for name, part in parts.items():
        part.load_state_dict(state.pop(name))
    torch.set_rng_state(generators["cpu"].cpu())
    if "cuda" in generators and torch.cuda.is_available():
        torch.cuda.set_rng_state(generators["cuda"].cpu())
    return state


def _has_state(part: Any) -> bool:
    return callable(getattr(part, "state_dict", None))
