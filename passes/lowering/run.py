"""Run: programs as one operator of torch, `sparsify::run`, by the native library or else by torch's operations."""

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from passes.kernels.compiler import native
from passes.kernels.costs import this_machine
from passes.lowering.interpret import interpret
from passes.lowering.plan import Plan, plan
from passes.lowering.program import Program
from passes.lowering.windows import Unsupported

_KEPT = 4  # plans of a program, for inputs of as many shapes; the one that was made first goes
_LIBRARY = torch.library.Library("sparsify", "FRAGMENT")
_LIBRARY.define("run(Tensor[] inputs, Tensor values, Tensor bits, str program) -> Tensor[]")
_PLANS: Any = WeakTensorKeyDictionary()  # {values: {(program, versions, shapes): plan, or why there is none}}
_LOCK = threading.Lock()


@lru_cache(maxsize=64)
def _parsed(text: str) -> Program:
    return Program.from_json(text)


def prepared(inputs: Sequence[Tensor], values: Tensor, bits: Tensor, program: str) -> Plan | str:
    """Return the native plan for inputs like these, or why there is none.

    Args:
        inputs: what the program runs on.
        values, bits: its numbers.
        program: its text.
    """
    if any(x.device.type != "cpu" or x.dtype is not torch.float32 for x in (*inputs, values)):
        return "the kernels are for float32 on CPUs"
    found = _PLANS.get(values)
    key = (program, _version(values), _version(bits), *(x.shape for x in inputs))
    if found is None or key not in found:
        with _LOCK:
            found = _PLANS.setdefault(values, {})
            if key not in found:
                made = _make(inputs, values, bits, program)
                for old in [k for k in found if k[:3] != key[:3]] + list(found)[: max(0, len(found) + 1 - _KEPT)]:
                    found.pop(old, None)  # of numbers that have changed since, or of the shape that came first
                found[key] = made
    return found[key]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _make(inputs: Sequence[Tensor], values: Tensor, bits: Tensor, program: str) -> Plan | str:
    library = native()
    if library is None:
        return "there is no native library"
    machine = this_machine(library)
    try:
        return plan(_parsed(program), [x.shape for x in inputs], values.detach(), bits, library, machine)
    except Unsupported as error:
        return str(error)


@torch.library.impl(_LIBRARY, "run", "CompositeExplicitAutograd")
def _run(inputs: list[Tensor], values: Tensor, bits: Tensor, program: str) -> list[Tensor]:
    found = prepared(inputs, values, bits, program)
    if isinstance(found, str):
        return _apart(interpret(_parsed(program), inputs, values, bits), inputs)
    outputs = [torch.empty(shape) for shape in found.shapes]
    found.native.run([x.contiguous() for x in inputs], outputs, found.images)
    return outputs


def _apart(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return outputs that lie as the kernels' do, and share no memory with inputs or each other."""
    taken = {x.untyped_storage().data_ptr() for x in inputs}
    found = []
    for output in outputs:
        output = output.contiguous()
        found.append(output.clone() if output.untyped_storage().data_ptr() in taken else output)
        taken.add(found[-1].untyped_storage().data_ptr())
    return found


@torch.library.register_fake("sparsify::run", lib=_LIBRARY)
def _fake(inputs: list[Tensor], values: Tensor, bits: Tensor, program: str) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in interpret(_parsed(program), inputs, values, bits)]


def _remember(ctx: Any, inputs: tuple[list[Tensor], Tensor, Tensor, str], output: list[Tensor]) -> None:
    given, values, bits, ctx.program = inputs
    ctx.save_for_backward(*given, values, bits)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[list[Tensor | None], Tensor | None, None, None]:
    *inputs, values, bits = ctx.saved_tensors
    with torch.enable_grad():
        given = [x.detach().requires_grad_() for x in (*inputs, values)]
        outputs = interpret(_parsed(ctx.program), given[:-1], given[-1], bits)
        *found, of_values = torch.autograd.grad(outputs, given, grads, allow_unused=True)
    return list(found), of_values, None, None


torch.library.register_autograd("sparsify::run", _backward, setup_context=_remember, lib=_LIBRARY)
