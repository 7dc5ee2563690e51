"""Training speed: what a training step of a masked model takes beside a dense one, whole and layer by layer."""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from passes.capture.copies import copied
from passes.capture.leaves import is_builtin
from passes.masking.products import Choice, choice_of

Call = Callable[[], Any]


def steps_of(model: nn.Module, dense: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Call, Call]:
    """Return a forward and backward pass of a dense model and of a masked one, both in training mode."""
    return tuple(_passes(m.train(), args, kwargs) for m in (dense, copied(model)))  # pyright: ignore[reportReturnType]


def layer_steps(
    model: nn.Module, dense: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[tuple[str, Choice, Call, Call]]:
    """Return each masked layer of torch.nn, what it chooses, and its passes, dense and masked, on what it is given."""
    own = copied(model).train()
    inputs: dict[str, Tensor] = {}
    layers = {n: m for n, m in own.named_modules() if is_builtin(m) and "weight_mask" in m._modules}

    def remember(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs.setdefault(names[layer], given[0].detach())

    names: dict[nn.Module, str] = {layer: name for name, layer in layers.items()}
    handles = [layer.register_forward_pre_hook(remember) for layer in names]
    own(*args, **kwargs)
    for handle in handles:
        handle.remove()
    found = []
    for name, x in inputs.items():
        given = (x.requires_grad_(x.is_floating_point()),)
        plain = dense.get_submodule(name).train()
        found.append((name, choice_of(layers[name], x), _passes(plain, given, {}), _passes(layers[name], given, {})))
    return found


def _passes(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    def run() -> None:
        model.zero_grad()
        out = [t for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        torch.autograd.backward(out, [torch.ones_like(t) for t in out])

    return run


def in_turns(calls: Sequence[Call], repeats: int, say: Callable[[str], object]) -> list[float]:
    """Return the median seconds of calls that take turns; a first round warms up."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 1):
        say(f"round {turn} of {repeats}")
        for own, call in zip(times, calls, strict=True):
            begin = time.perf_counter()
            call()
            own.append(time.perf_counter() - begin)
    return [median(own[1:]) for own in times]
