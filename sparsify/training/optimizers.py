"""Optimizers: the little that a topology update has to know of them.

Nothing is patched: hooks are the official ones, and what an optimizer keeps per weight is recognised by its shape.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from passes.capture.effects import preserve_rng
from passes.shards import whole

# With a gradient of zero and a state of zero these leave a weight of zero at zero.
_KEEP_ZEROS = frozenset("SGD Adam AdamW Adamax NAdam RAdam RMSprop Adagrad Adadelta ASGD Rprop Adafactor LBFGS".split())

# With a gradient of zero these leave a weight where it is. Their state need not begin at zero.
_STAND_STILL = frozenset("Rprop Adagrad".split())

# What these do to an element of a parameter depends on no other.
_ELEMENTWISE = _KEEP_ZEROS - {"Adafactor", "LBFGS"}


def keeps_zeros(optimizer: Optimizer) -> bool:
    """Whether an optimizer is known to leave dropped weights at 0, unlike Muon."""
    return _is_one_of(optimizer, _KEEP_ZEROS)


def stands_still(optimizer: Optimizer) -> bool:
    """Whether an optimizer is known to move nothing that has a gradient of 0, not even by momentum."""
    return _is_one_of(optimizer, _STAND_STILL)


def is_elementwise(optimizer: Optimizer) -> bool:
    """Whether an optimizer is known to treat every element of a parameter by itself, so that its shape does not matter."""
    return _is_one_of(optimizer, _ELEMENTWISE)


def _is_one_of(optimizer: Optimizer, names: frozenset[str]) -> bool:
    return type(optimizer).__module__.startswith("torch.optim") and type(optimizer).__name__ in names


def parameters(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    """Yield every parameter of an optimizer."""
    for group in optimizer.param_groups:
        yield from group["params"]


def group_sizes(optimizer: Optimizer) -> list[int]:
    """Return the numbers of parameters in the groups, which `add_param_group` changes."""
    return [len(group["params"]) for group in optimizer.param_groups]


def state_tensors(optimizer: Optimizer, weight: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """Yield what an optimizer keeps for each element of a weight: every state tensor of its shape, after its name."""
    for holder in _holders(optimizer):
        for key, value in holder.state.get(weight, {}).items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                yield key, value


def _holders(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer, and those that it leaves state to (ZeroRedundancyOptimizer, Lookahead)."""
    return [optimizer, *(value for value in vars(optimizer).values() if isinstance(value, Optimizer))]


def first_states(optimizer: Optimizer) -> dict[nn.Parameter, dict[str, float]]:
    """Return what an optimizer gives each element of a new parameter where that is not 0, for every parameter it trains.

    Rprop begins with a step size, Adagrad with an accumulator. A fresh optimizer of the same class and options is asked.
    """
    found: dict[nn.Parameter, dict[str, float]] = {}
    answers: dict[str, dict[str, float]] = {}
    for holder in _holders(optimizer):
        for group in holder.param_groups:
            options = _options(holder, group)
            plain = {k: id(v) if isinstance(v, Tensor) else v for k, v in options.items()}
            for p in group["params"]:
                key = f"{type(holder)} {p.dtype} {plain}"  # many groups differ in nothing
                if key not in answers:
                    answers[key] = _first_state(type(holder), options, p.dtype)
                found |= {p: answers[key]} if answers[key] else {}
    return found


def _options(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    names = optimizer.defaults.keys()
    return {k: group[k] for k in names if k in group} | {k: v for k, v in _ON_CPU.items() if k in names}


def _first_state(kind: Any, options: dict[str, Any], dtype: torch.dtype) -> dict[str, float]:
    """Ask on the CPU, so that a device is waited for only where a rate on it matters.

    What an optimizer begins with shows in its first step. One that cannot be made from a group's options, or asks for more
    than a gradient, is taken to begin with 0, as nearly all do.
    """
    rates = {k: v for k, v in options.items() if isinstance(v, Tensor) and v.device.type != "cpu"}
    state = _begins(kind, options | dict.fromkeys(rates, 0.5), dtype)
    return _begins(kind, options | {k: v.cpu() for k, v in rates.items()}, dtype) if rates and state else state


_ON_CPU = {"fused": None, "foreign": None, "capturable": False}


class _First(dict[str, Any]):
    """State of one parameter that remembers what its entries were at first."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, Any] = {}

    def __setitem__(self, key: str, value: Any) -> None:
        self.first.setdefault(key, value.clone() if isinstance(value, Tensor) else value)
        super().__setitem__(key, value)


def _begins(kind: Any, options: dict[str, Any], dtype: torch.dtype) -> dict[str, float]:
    probe = nn.Parameter(torch.zeros(1, 1, dtype=dtype, device="cpu"))
    probe.grad = torch.zeros_like(probe)
    try:
        optimizer, state = kind([probe], **options), _First()
        for key, value in optimizer.state[probe].items():  # of Adagrad, which does not wait for the first step
            state[key] = value
        optimizer.state[probe] = state
        with torch.no_grad(), preserve_rng():
            inspect.unwrap(kind.step)(optimizer)  # without the hooks of all optimizers
        first = state.first.items()
        return {k: float(v) for k, v in first if isinstance(v, Tensor) and v.shape == probe.shape and v.any()}
    except Exception:
        return {}


def dense_gradient(optimizer: Optimizer, weight: nn.Parameter) -> Tensor | None:
    """Return the gradient of a weight as the loss has it: a fused optimizer under GradScaler still holds it scaled."""
    gradient = weight.grad if weight.grad is not None else _SKIPPED.get(optimizer, {}).get(weight)
    if gradient is None:
        return None
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    scale = getattr(optimizer, "grad_scale", None)
    return gradient if scale is None else gradient / scale


def stands(optimizer: Optimizer) -> set[nn.Parameter]:
    """Return the parameters of groups that a learning rate of 0 freezes while others train, as far as the host knows."""
    still = [group for group in optimizer.param_groups if _is_zero(group.get("lr"))]
    return {p for group in still for p in group["params"]} if len(still) < len(optimizer.param_groups) else set()


def _is_zero(rate: Any) -> bool:
    return rate is not None and not (isinstance(rate, Tensor) and rate.device.type != "cpu") and bool(rate == 0)


def is_idle(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a step trains nothing, as far as the host knows without waiting.

    Either a fused optimizer is about to skip it, for a gradient that overflowed; or rates and gradients are all 0, and no
    closure will make others: torch.distributed.checkpoint takes such a step to learn what state an optimizer keeps. Rates are
    the same on all ranks, so those that shard gradients ask together.
    """
    overflow = getattr(optimizer, "found_inf", None)  # set by GradScaler
    if isinstance(overflow, Tensor) and overflow.device.type == "cpu" and overflow:
        return True
    if _closure(args, kwargs) is not None:
        return False
    if not all(_is_zero(group.get("lr")) for group in optimizer.param_groups):
        return False
    gradients = [p.grad for p in parameters(optimizer) if p.grad is not None]
    return bool(gradients) and not any(bool(whole(gradient).any()) for gradient in gradients)


_SKIPPED: WeakKeyDictionary[Optimizer, dict[nn.Parameter, Tensor]] = WeakKeyDictionary()


def skip_step(optimizer: Optimizer) -> None:
    """Make the optimizer's step do nothing: parameters without a gradient are left alone, state included."""
    gradients = _SKIPPED.setdefault(optimizer, {})
    for parameter in parameters(optimizer):
        if parameter.grad is not None:
            gradients[parameter], parameter.grad = parameter.grad, None


def end_skip(optimizer: Optimizer) -> None:
    """Give the parameters back the gradients that `skip_step` took away."""
    for parameter, gradient in _SKIPPED.pop(optimizer, {}).items():
        parameter.grad = gradient


def forget_gradient(optimizer: Optimizer, weight: nn.Parameter) -> None:
    """Let a parameter have no gradient, also after `end_skip`."""
    weight.grad = None
    _SKIPPED.get(optimizer, {}).pop(weight, None)


def forget_history(optimizer: Optimizer) -> None:
    """Clear what LBFGS remembers of steps taken on another topology."""
    if isinstance(optimizer, torch.optim.LBFGS):
        for state in optimizer.state.values():
            state.clear()


def before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], action: Callable[[], None]) -> Any:
    """Run `action` once the gradients of this step are there: now, or after the closure that computes them.

    Returns:
        What the step pre-hook has to return: None, or the arguments with the closure wrapped.
    """
    closure = _closure(args, kwargs)
    if closure is None:
        action()
        return None

    def closure_then_action() -> Any:
        loss = closure()
        action()
        return loss

    if len(args) > 1:  # args[0] is the optimizer itself
        return (args[0], closure_then_action, *args[2:]), kwargs
    return args, {**kwargs, "closure": closure_then_action}


def _closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    return args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer itself
