"""Shards: tensors spread over ranks, a part on each, as FSDP2 (`fully_shard`) makes of parameters.

Masks are whole on every rank: one byte per weight, and no communication to keep them equal. What is sharded is gathered
where a mask is decided, and masked where it lies.
"""

import sys
from typing import Any

from torch import Tensor, nn


def is_sharded(value: Any) -> bool:
    """Whether a tensor is spread over ranks."""
    module = sys.modules.get("torch.distributed.tensor")  # half a second to import, and without it there is no such tensor
    return module is not None and isinstance(value, module.DTensor)


def refuse_shards(model: nn.Module) -> None:
    """Raise if parameters of a model are spread over ranks.

    Raises:
        ValueError: naming the first.
    """
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise ValueError(
                f"{name} is sharded over ranks. Load the whole state_dict, which get_model_state_dict(model, options="
                f"StateDictOptions(full_state_dict=True)) returns, into a copy that is not sharded, and go on with that."
            )


class Deferred:
    """Something that is a tensor when it is asked for, for what would take much memory before."""

    def full_tensor(self) -> Tensor:
        """Return the tensor. Every rank has to call it."""
        raise NotImplementedError


def whole(value: Any) -> Any:
    """Return a tensor in one piece, with the parts of all ranks, and anything else as it is. Every rank has to call it."""
    return value.full_tensor() if is_sharded(value) or isinstance(value, Deferred) else value


def local(tensor: Any) -> Tensor:
    """Return this rank's part of a sharded tensor, sharing its memory, and any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def own_part(tensor: Tensor, like: Any) -> Tensor:
    """Return the part of a whole tensor that lies where this rank's part of `like` does; no communication.

    Args:
        tensor: the same on every rank, the shape of `like`.
        like: a tensor, sharded or not.

    Returns:
        `tensor` itself where `like` is not sharded.
    """
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements).to_local()
