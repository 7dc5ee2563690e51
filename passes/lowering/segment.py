"""Segment: the module that stands for a part of a graph and runs its program."""

from typing import Any

import torch
from torch import Tensor, nn

import passes.lowering.run  # noqa: F401 - registers the operator
from passes.lowering.build import Constants
from passes.lowering.program import Program


class Segment(nn.Module):
    """Runs a program: `sparsify::run` on its inputs.

    Attributes:
        program: the text of the program; `Program.from_json` reads it.
        values, bits: its numbers, as buffers.
    """

    values: Tensor
    bits: Tensor

    def __init__(self, program: Program, constants: Constants) -> None:
        """Hold a program and its numbers."""
        super().__init__()
        self.program = program.to_json()
        self._single = len(program.outputs) == 1
        values, bits = constants.tensors()
        self.register_buffer("values", values)
        self.register_buffer("bits", bits)

    def forward(self, *inputs: Tensor) -> Any:
        """Return the only output, or all of them."""
        outputs = torch.ops.sparsify.run(list(inputs), self.values, self.bits, self.program)
        return outputs[0] if self._single else tuple(outputs)

    def extra_repr(self) -> str:
        """Name what is computed."""
        ops = Program.from_json(self.program).ops
        return f"{len(ops)} operations, {', '.join(op.name for op in ops if op.weight)}"
