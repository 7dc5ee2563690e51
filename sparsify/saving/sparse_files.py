"""Sparse files: a model as kept values and mask bits in one safetensors file; never pickle.

A masked weight `w` of density below 1 is two tensors: `w`, the kept values in the order of `w.flatten()`, and `w#mask`, one bit
per weight, 8 to a byte, the first in the lowest bit. Every other entry of the `state_dict` is stored as it is, one that
several names share once. Shapes, shared names and a digest of everything are in the file's metadata.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from passes.masking.fold import transformed_weights
from passes.masking.mask import Mask, masks_of
from passes.shards import refuse_shards
from sparsify.saving.files import replacing
from sparsify.saving.packing import pack, unpack
from sparsify.training.lookup import updater_of, updaters_of, where_sparse

_FORMAT, _VERSION = "sparsify", "1"
_BITS = "#mask"


def save_sparse(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a sparsified model to a file of about `flop_report(model, ...).sparse_bytes`; values are exact.

    The file holds the network: weights, masks, buffers. What training needs besides (step, schedule, averages) is in
    `model.state_dict()`; see `save_checkpoint`. A process that is killed leaves the file before or the file after.

    Args:
        model: what `sparsify` returned.
        path: of the file; its folder exists. Other tools read it as safetensors.

    Raises:
        ValueError: the model has no masks, is sharded or on the meta device, or its `state_dict` holds more than tensors.
        ImportError: the package safetensors is not there.

    Example:
        >>> import pathlib, tempfile
        >>> from sparsify import flop_report, load_sparse, sparsify
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "net.safetensors"
        >>> model = sparsify(nn.Sequential(nn.Linear(256, 256)), density=0.1)
        >>> save_sparse(model, path)
        >>> path.stat().st_size < flop_report(model, (1, 256)).sparse_bytes + 600
        True
        >>> dense = load_sparse(nn.Sequential(nn.Linear(256, 256)), path)
        >>> torch.equal(dense[0].weight, model[0].weight)
        True
    """
    serialize = _safetensors().torch.save_file
    masks = masks_of(model) if isinstance(model, nn.Module) else {}
    if not masks or not updater_of(model):
        raise ValueError(f"save_sparse() takes the model that sparsify() returned; {where_sparse(model)}.")
    names: dict[int, str] = {}  # of tensors that several names share
    state = {name: (value, names.setdefault(id(value), name)) for name, value in _network(model).items()}
    shared = {name: first for name, (_, first) in state.items() if first != name}
    own = {name: value.detach().cpu() for name, (value, _) in state.items() if name not in shared}
    sparse = [name for name in own if name in masks and masks[name].density < 1]
    shapes = {name: list(own[name].shape) for name in sparse}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        packed = list(pool.map(lambda name: pack(own[name], masks[name].mask.cpu()), sparse))
    content = {k: t.clone(memory_format=torch.contiguous_format) for k, t in own.items() if k not in shapes}
    for name, (kept, bits) in zip(sparse, packed, strict=True):
        content |= {name: kept, name + _BITS: bits}
    facts = {"format": _FORMAT, "version": _VERSION, "shapes": json.dumps(shapes), "shared": json.dumps(shared)}
    facts["transformed"] = json.dumps(transformed_weights(model))
    facts["digest"] = _digest(content, facts)
    with replacing(path) as partial:
        serialize(content, partial, facts)


def load_sparse(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Read a file of `save_sparse` into a model of the same architecture, dense or sparsified.

    A sparsified model takes over masks and weights, at whatever density the file has; it is detached, and its training
    starts anew. A dense one gets weights with zeros: `sparsify(model, masks=model)` would mask it again.

    Args:
        model: whose weights are replaced.
        path: of the file.

    Returns:
        The same object.

    Raises:
        ValueError: the file is damaged, truncated or something else, or does not fit the model; the first difference is
            named and nothing was changed.
        ImportError: the package safetensors is not there.
    """
    if not isinstance(model, nn.Module) or (updaters_of(model) and not updater_of(model)):
        raise ValueError(f"load_sparse() takes the dense model or the one that sparsify() returned; {where_sparse(model)}.")
    state, masks = read_sparse(path)
    transformed = json.loads(_facts(path).get("transformed", "[]"))
    if transformed and not masks_of(model):
        raise ValueError(
            f"{path} cannot be read into a dense model: that computes another weight from {transformed[0]} than the sparse one "
            f"does. Sparsify the model, with any density, and read the file into that; fold() then makes it dense."
        )
    own = _network(model)
    for name in dict.fromkeys([*own, *state]):
        if name not in own or name not in state:
            raise ValueError(
                f"{path} is of another architecture: {name} is in the {'file' if name in state else 'model'} only."
            )
        facts = [(tuple(value.shape), str(value.dtype)) for value in (state[name], own[name])]
        if facts[0] != facts[1]:
            shapes = " and ".join(f"{shape} {dtype}" for shape, dtype in facts)
            raise ValueError(f"{path} does not fit: {name} is {shapes} in the file and in the model.")
    if masks_of(model):
        unmasked = [name for name in masks if name not in masks_of(model)]
        if unmasked:
            raise ValueError(
                f"{path} masks {unmasked[0]}, which the model keeps dense. Load it into the dense model, then sparsify that "
                f"with masks=model."
            )
        names = {mask: name for name, mask in masks_of(model).items()}
        for where, mask in model.named_modules(remove_duplicate=False):  # tied weights have several paths
            if isinstance(mask, Mask):
                state[f"{where}.mask"] = masks.get(names[mask], torch.ones(mask.mask.shape, dtype=torch.bool))
    model.load_state_dict(state, strict=False)
    if updater := updater_of(model):
        updater.detach()
    return model


def read_sparse(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read and check a file of `save_sparse` without a model.

    Args:
        path: of the file.

    Returns:
        ({name: tensor}, zeros included, as the dense model's `state_dict`; {name: bool mask} of the sparse weights).

    Raises:
        ValueError: the file is damaged, truncated or something else.
        ImportError: the package safetensors is not there.
    """
    package = _safetensors()
    try:
        with package.safe_open(os.fspath(path), "pt") as file:
            facts = file.metadata() or {}
            if facts.get("format") != _FORMAT:
                raise ValueError(f"it is a file of {facts.get('format')!r}, not of save_sparse()")
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        shapes, shared = (json.loads(facts[key]) for key in ("shapes", "shared"))
    except FileNotFoundError:
        raise
    except (package.SafetensorError, KeyError, ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is not a sparse file, or is damaged: {type(error).__name__}: {error}") from error
    if facts.get("version") != _VERSION:
        raise ValueError(f"{path} is of version {facts.get('version')!r} of the format; this library reads {_VERSION!r}.")
    if facts.get("digest") != _digest(content, facts):
        raise ValueError(f"{path} is damaged: its content does not match its digest.")
    return _unpack_all(path, content, shapes, shared)


def _facts(path: Any) -> dict[str, str]:
    with _safetensors().safe_open(os.fspath(path), "pt") as file:
        return file.metadata() or {}


def _unpack_all(path: Any, content: dict[str, Tensor], shapes: Any, shared: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Undo the packing, trusting nothing: a digest says that a file is whole, not who wrote it."""
    if not isinstance(shapes, dict) or not isinstance(shared, dict):
        raise ValueError(f"{path} is damaged: its metadata are not mappings.")
    packed = {name for name in content if name.endswith(_BITS)}
    if packed != {f"{name}{_BITS}" for name in shapes} or not all(name in content for name in shapes):
        raise ValueError(f"{path} is damaged: values, masks and shapes are not of the same weights.")
    state = {name: tensor for name, tensor in content.items() if name not in packed}
    masks = {}
    for name, shape in shapes.items():
        try:
            state[name], masks[name] = unpack(state[name], content[name + _BITS], shape)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {name}: {error}") from error
    for name, first in shared.items():
        if name in state or not isinstance(first, str) or first not in state:
            raise ValueError(f"{path} is damaged: {name} is said to be {first!r}, which the file does not hold.")
    return state | {name: state[first] for name, first in shared.items()}, masks


def _network(model: nn.Module) -> dict[str, Tensor]:
    """Return what a file holds: the entries of a `state_dict` but masks and the state of training."""
    refuse_shards(model)
    entries = model.state_dict(keep_vars=True)
    masks = {f"{name}_mask.mask" for name in entries}
    kept = {k: v for k, v in entries.items() if k not in masks and not k.startswith("updater.")}
    for name, value in kept.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is of type {type(value).__name__}; a sparse file holds tensors only.")
        if value.is_meta:
            raise ValueError(f"{name} is on the meta device, where it has no values. Give it some first: model.to_empty().")
    return kept


def _digest(content: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for key in sorted(facts.keys() - {"digest"}):
        digest.update(f"{key}={facts[key]}\n".encode())
    for name in sorted(content):
        tensor = content[name]
        digest.update(f"{name}: {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("Sparse files need the package safetensors: pip install 'sparsify-fx[files]'.") from error
    return safetensors
