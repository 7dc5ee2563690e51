"""Build: nodes of a graph as a program, with activations, sums and biases fused into what computes them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, fx

from passes.lowering.operation import Operation, shape_of
from passes.lowering.program import SUMS, Op, Program, Weight


class Constants:
    """The numbers of a program: kept values and biases behind each other, and the bits that say which values are kept."""

    def __init__(self) -> None:
        """Begin with none."""
        self._values: list[np.ndarray] = []
        self._bits: list[np.ndarray] = []
        self._count = self._bytes = 0

    def weight(self, tensor: Tensor) -> Weight:
        """Add a weight: its kept values and their bits, or all its values where few are 0."""
        flat = tensor.detach().contiguous().numpy().reshape(-1)
        kept = flat != 0
        count = int(np.count_nonzero(kept))
        sparse = count * 4 + flat.size / 8 < flat.size * 4
        start = self._add(flat[kept] if sparse else flat)
        weight = Weight(tuple(tensor.shape), start, count if sparse else flat.size, self._bytes)
        if sparse:
            self._bits.append(np.packbits(kept))
            self._bytes += self._bits[-1].size
        return weight

    def bias(self, tensor: Tensor) -> int:
        """Add a bias, and return where it starts."""
        return self._add(tensor.detach().contiguous().numpy())

    def _add(self, values: np.ndarray) -> int:
        self._values.append(values)
        self._count += values.size
        return self._count - values.size

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return all values and all bits."""
        values = np.concatenate([*self._values, np.zeros(0, np.float32)]).astype(np.float32)
        return torch.from_numpy(values), torch.from_numpy(np.concatenate([*self._bits, np.zeros(0, np.uint8)]))


def build(
    nodes: Sequence[fx.Node], known: Mapping[fx.Node, Operation], outputs: Iterable[fx.Node]
) -> tuple[Program, Constants, list[fx.Node]]:
    """Return the program of some nodes.

    Args:
        nodes: those to compute, in the order of the graph.
        known: what they are.
        outputs: those of them whose values are wanted.

    Returns:
        The program, its numbers, and the nodes that are its inputs.
    """
    wanted, own = list(outputs), set(nodes)
    inputs = list(dict.fromkeys(n for node in nodes for n in known[node].inputs if n not in own))
    ops: list[Op] = []
    number: dict[fx.Node, int] = {node: i for i, node in enumerate(inputs)}
    constants = Constants()
    uses = Counter(_source(n, known) for node in nodes if known[node].kind != "identity" for n in known[node].inputs)
    uses.update(_source(node, known) for node in wanted)
    for node in nodes:
        operation = known[node]
        if operation.kind == "identity":
            number[node] = number[operation.inputs[0]]
            continue
        fused = _fused(operation, known, ops, number, uses, len(inputs))
        if fused is None:
            ops.append(_op(node, operation, number, constants))
            number[node] = len(inputs) + len(ops) - 1
        else:
            place, op = fused
            ops[place] = op
            number[node] = len(inputs) + place
    said = _channels_last(nodes, known)
    last = tuple(said.get(node, len(shape_of(node) or ()) != 4) for node in inputs)
    return Program(last, tuple(ops), tuple(number[node] for node in wanted)), constants, inputs


def _source(node: fx.Node, known: Mapping[fx.Node, Operation]) -> fx.Node:
    """Return the node whose value a node passes on."""
    while node in known and known[node].kind == "identity":
        node = known[node].inputs[0]
    return node


def _fused(
    operation: Operation,
    known: Mapping[fx.Node, Operation],
    ops: list[Op],
    number: Mapping[fx.Node, int],
    uses: Mapping[fx.Node, int],
    inputs: int,
) -> tuple[int, Op] | None:
    """Return the place and the new form of the operation before this one, if that one can do the work of both."""
    by_place = {number[n] - inputs: n for n in operation.inputs}
    place = max(by_place)
    if place < 0 or ops[place].activation[0] != "none" or uses[_source(by_place[place], known)] > 1:
        return None
    before = ops[place]
    if operation.kind == "activation" and before.kind in (*SUMS, "add", "multiply", "mean"):
        return place, replace(before, activation=operation.activation)
    plain = operation.kind == "add" and before.kind in SUMS and len(before.inputs) == 1 and len(by_place) == 2
    if plain and len({shape_of(n) for n in operation.inputs}) == 1:
        return place, replace(before, inputs=(before.inputs[0], min(by_place) + inputs))
    return None


def _op(node: fx.Node, operation: Operation, number: Mapping[fx.Node, int], constants: Constants) -> Op:
    options = operation.options
    if operation.kind == "channels":
        pieces = [[i, 0, (shape_of(n) or (0, 0))[1]] for i, n in enumerate(operation.inputs)]
        options = {"pieces": pieces}
    weight = None if operation.weight is None else constants.weight(operation.weight)
    bias = None if operation.bias is None else constants.bias(operation.bias)
    found = tuple(number[n] for n in operation.inputs)
    return Op(operation.kind, found, node.name, weight, bias, operation.activation, options or None)


def _channels_last(nodes: Sequence[fx.Node], known: Mapping[fx.Node, Operation]) -> dict[fx.Node, bool]:
    """Return of values, where operations say it, whether channels are the last dimension."""
    found: dict[fx.Node, bool] = {}
    for node in nodes:
        operation = known[node]
        if operation.last is not None:
            biased = operation.options.get("biased", False)
            found |= dict.fromkeys(operation.inputs[: len(operation.inputs) - biased], operation.last)
            found |= dict.fromkeys(operation.inputs[len(operation.inputs) - biased :], False)
            found[node] = operation.last is not (operation.kind == "permute")
    same = [(node, *known[node].inputs) for node in nodes if known[node].last is None]
    count = -1
    while count != len(found):  # what takes both has them where its operands do
        count = len(found)
        for values in same:
            last = next((found[value] for value in values if value in found), None)
            found |= {} if last is None else {value: last for value in values if value not in found}
    return found
