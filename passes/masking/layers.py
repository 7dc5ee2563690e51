"""Layers: modules whose own code reads their weights, run on masked ones.

Conv and linear layers call their operation with the masked weight; a sparse kernel would go there. Others, torch.nn's and the
user's, run their own code, and what it reads is masked (`passes.capture.host`).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from passes.capture.host import Host, container_methods, masked, run_reading
from passes.capture.leaves import CONV_FORWARDS
from passes.masking.mask import PRODUCT
from passes.masking.products import sparse_layer


class Masked(Host):
    """Mixin: a module whose own code, torch.nn's or the user's, runs on masked weights."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _new_masked, (leaf_class(self), type(self).__name__), self.__getstate__()


def leaf_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a masked module had before."""
    return type(module).__bases__[1]


def _linear(self: Any, input: Tensor) -> Tensor:
    if (result := sparse_layer(self, input)) is not None:
        return result
    return F.linear(input, masked(self, "weight", PRODUCT), masked(self, "bias"))


def _convolution(self: Any, input: Tensor) -> Tensor:
    if (result := sparse_layer(self, input)) is not None:
        return result
    return self._conv_forward(input, masked(self, "weight", self.weight_role), masked(self, "bias"))


# What runs without reading anything by its attribute: the forward methods of most weights, and what stands for them.
_DIRECT: dict[Any, Callable[..., Any]] = {
    nn.Linear.forward: _linear,
    **dict.fromkeys((nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward), _convolution),
}


def _flat_weights(self: Any) -> list[Any]:
    """What recurrent layers read instead of their parameters."""
    return [getattr(self, name, None) for name in self._flat_weights_names]


def _set_flat_weights(self: Any, weights: list[Any]) -> None:
    vars(self)["_flat_weights"] = weights


def _keep_flat_weights(self: Any) -> None:
    """Leave the list as it is: it holds masked tensors, and torch would think that the parameters changed."""


@functools.cache
def masked_class(base: type[nn.Module], name: str) -> Any:
    """Return a class of this name that runs the class `base` on masked weights."""
    direct = _DIRECT.get(base.forward)

    @functools.wraps(base.forward)  # keeps signature and module, which `is_builtin` reads
    def forward(self: Masked, *args: Any, **kwargs: Any) -> Any:
        return direct(self, *args, **kwargs) if direct else run_reading(base.forward, self, *args, **kwargs)

    own: dict[str, Any] = {"forward": forward, "__doc__": base.__doc__, "__module__": base.__module__}
    own["weight_role"] = PRODUCT if getattr(base, "_conv_forward", None) in CONV_FORWARDS else None
    if issubclass(base, nn.RNNBase):
        own |= {"_flat_weights": property(_flat_weights, _set_flat_weights), "_update_flat_weights": _keep_flat_weights}
    return type(name, (Masked, base), own | container_methods(base))


def _new_masked(base: type[nn.Module], name: str) -> Masked:
    return nn.Module.__new__(masked_class(base, name))
