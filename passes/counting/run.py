"""Run: the operations of a model on inputs of a given shape, found on the meta device without data where that is possible.

A copy of the model's structure runs on meta tensors under `passes.counting.recorder`. The model itself, its hooks, buffers and
generators are not touched.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from passes.capture.captured import Captured
from passes.capture.copies import FORWARD_HOOKS, copied, hooks_of
from passes.capture.effects import Snapshot, preserve_rng
from passes.capture.host import Guest
from passes.counting.recorder import Operation, Recorder
from passes.kernels.values import expand
from passes.masking.mask import BESIDE, Mask, masks_of


@dataclass(frozen=True)
class Record:
    """The operations of one forward pass, in order."""

    operations: list[Operation]
    measured: bool  # whether the pass ran on the example data itself, because shapes depend on it


def record(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Record:
    """List the operations of one forward pass in evaluation mode, from shapes alone wherever that is possible.

    Where shapes depend on data (the boxes that a detector keeps), the pass runs on the inputs themselves, if they are real.

    Args:
        model: any module, on any device.
        args: the positional arguments of forward.
        kwargs: the keyword arguments of forward.

    Returns:
        The operations, and whether they were measured on data.

    Raises:
        ValueError: the inputs do not fit, the message naming the node and the module that refused them; or shapes depend
            on data and there is none.

    Example:
        >>> [op.name for op in record(nn.Linear(2, 3), (torch.empty(1, 2),)).operations]
        ['aten.t', 'aten.addmm']
    """
    inputs = (tuple(args), dict(kwargs or {}))
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    real = not any(t.is_meta for t in [*tensors, *model.parameters(), *model.buffers()])
    hooks = hooks_of(model)
    attempts = [(True, True)] + [(True, False)] * bool(hooks) + [(False, True)] * real  # (on meta, with hooks)
    failures: list[tuple[Exception, str]] = []
    for meta, hooked in attempts:
        recorder, state = Recorder(), Snapshot([], hooks)
        try:
            _run(model, recorder, inputs, meta, hooked)
            return Record(recorder.operations, measured=not meta)
        except Exception as error:
            failures.append((error, recorder.where()))
        finally:
            state.restore()
    failure, where = failures[-1] if real else failures[0]
    shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
    reason = str(failure).partition("\n")[0]
    if not real and _needs_data(failure):
        raise ValueError(
            f"What the model computes depends on data, at {where} ({reason}). Give example inputs with values, "
            f"such as torch.rand(...), and a model that is not on the meta device."
        ) from failure
    raise ValueError(f"Inputs of shape {shapes} do not fit the model, at {where}: {reason}") from failure


def _needs_data(error: Exception) -> bool:
    """Whether an operation failed because meta tensors have no values: torch has no one exception for it."""
    phrases = ("meta tensor", "meta backend", "meta device", "'meta'", "data-dependent", "data dependent", "data-independent")
    return any(phrase in str(error).lower() for phrase in phrases)


def _run(model: nn.Module, recorder: Recorder, inputs: Any, meta: bool, hooked: bool) -> None:
    """Run a copy of a model's structure on meta tensors or on the inputs, and record it."""
    shadow = _shadow(model, recorder, meta, hooked)
    copy_input = (lambda t: torch.empty_like(t, device="meta")) if meta else Tensor.clone
    args, kwargs = pytree.tree_map_only(Tensor, copy_input, inputs)
    recorder.know(shadow, masks_of(model))
    recorder.watch(shadow)
    with preserve_rng(), torch.enable_grad(), _without_libraries(), recorder:  # no fast path of attention with gradients
        shadow(*args, **kwargs)


@contextlib.contextmanager
def _without_libraries() -> Iterator[None]:
    """Let recurrent layers run as products, as on the meta device, instead of calling one opaque operation of a library."""
    libraries: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    before = [library.enabled for library in libraries]
    try:
        for library in libraries:
            library.enabled = False
        yield
    finally:
        for library, enabled in zip(libraries, before, strict=True):
            library.enabled = enabled


def _shadow(model: nn.Module, recorder: Recorder, meta: bool, hooked: bool) -> nn.Module:
    """Copy a model's structure, in evaluation mode; tied weights stay tied.

    On the meta device, or around the model's own parameters. Masks tell the recorder what they get, and return it: weights are
    kept masked, and the weight behind them stays recognisable.
    """
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(_empty(p), p.is_floating_point()) if meta else p
    for name, mask in masks_of(model).items():
        if mask.compressed:
            values = model.get_parameter(name)
            empty = torch.empty(mask.mask.shape, dtype=values.dtype, device="meta")
            memo[id(values)] = nn.Parameter(empty if meta else expand(values.detach(), mask.mask))
    for b in model.buffers():
        memo[id(b)] = _empty(b) if meta else b.clone()
    for module in model.modules():
        own = vars(module)
        memo |= {id(v): type(v)() for k, v in own.items() if k in _DROPPED or (isinstance(v, dict) and not v)}
        if isinstance(module, Mask):
            memo[id(module)] = _Unmasked(recorder)
        elif isinstance(module, Captured):
            memo |= {id(graph): graph for graph in module._graphs.values()}  # which are only read
    shadow = copied(model, memo)
    for module in shadow.modules():
        vars(module)["training"] = False
        for hooks in FORWARD_HOOKS if not hooked else ():
            vars(module)[hooks].clear()
    return shadow


# Hooks of what does not happen here: backward passes, state_dicts.
_DROPPED = frozenset(k for k in vars(nn.Module()) if k.endswith("_hooks")) - {*FORWARD_HOOKS}


def _empty(tensor: Tensor) -> Tensor:
    # `empty_like` of a tensor that is on meta already takes ten times as long.
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


class _Unmasked(Guest):
    """Stands for a mask."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def forward(self, weight: Tensor, role: str | None = None, source: Tensor | None = None) -> Tensor:
        """Return the weight as it is, as a tensor of its own."""
        return weight if role == BESIDE else self.recorder.through_mask(weight)

    read = forward
