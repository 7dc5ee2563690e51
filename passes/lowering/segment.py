"""Segment: the module that stands for a part of a graph and runs its program."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import passes.lowering.run  # noqa: F401 - registers the operator
from passes.lowering.build import Constants
from passes.lowering.interpret import interpret
from passes.lowering.program import Program

_ROW_BY_ROW = ("linear", "activation", "add", "layer_norm")


class Segment(nn.Module):
    """Runs a program: `sparsify::run` on its inputs.

    Attributes:
        program: the text of the program; `Program.from_json` reads it.
        values, bits: its numbers, as buffers.
    """

    values: Tensor
    bits: Tensor

    def __init__(self, program: Program, constants: Constants, shapes: Sequence[Sequence[int]]) -> None:
        """Hold a program, its numbers, and the shapes of inputs that it was made for."""
        super().__init__()
        self.training = False
        self.program = program.to_json()
        any_rank = all(op.kind in _ROW_BY_ROW for op in program.ops)
        self._given = []  # of each input: its rank, 0 where any will do, where channels are, and how many
        for shape, last in zip(shapes, program.inputs, strict=True):
            dim = -1 if last else 1
            self._given.append((0 if any_rank and last else len(shape), dim, shape[dim]))
        self._single = len(program.outputs) == 1
        values, bits = constants.tensors()
        self.register_buffer("values", values)
        self.register_buffer("bits", bits)

    def forward(self, *inputs: Tensor) -> Any:
        """Return the only output, or all of them.

        Raises:
            ValueError: an input has another rank, other channels or numbers than the program was made for.
        """
        for x, (rank, dim, channels) in zip(inputs, self._given, strict=True):
            if x.dim() < 2 or x.dim() != (rank or x.dim()) or x.shape[dim] != channels or not x.is_floating_point():
                raise ValueError(
                    f"This lowered model takes floating numbers in {rank or 'some'} dimensions, {channels} along dimension "
                    f"{dim}, and was given {x.dtype} of {tuple(x.shape)}. Batch and sizes may vary; for others, lower() again."
                )
        if self.values.is_meta:  # where operations are counted, one by one
            outputs = interpret(Program.from_json(self.program), inputs, self.values, self.bits)
        else:
            outputs = torch.ops.sparsify.run(list(inputs), self.values, self.bits, self.program)
        return outputs[0] if self._single else tuple(outputs)

    def extra_repr(self) -> str:
        """Name what is computed."""
        ops = Program.from_json(self.program).ops
        return f"{len(ops)} operations, {', '.join(op.name for op in ops if op.weight)}"


def refuse_lowered(model: nn.Module, name: str) -> None:
    """Raise ValueError for a model of `lower` with layers that are programs."""
    if any(isinstance(module, Segment) for module in model.modules()):
        raise ValueError(f"{name}() takes a model as it was before lower(), whose layers can be seen.")
