"""Program: what a part of a graph computes, as plain data, so that it can be printed, pickled, exported and compared."""

import json
from dataclasses import asdict, dataclass
from typing import Any

SUMS = ("conv", "linear")  # the operations that sum up weights times inputs


@dataclass(frozen=True)
class Weight:
    """A weight of a program: where its kept values lie in the program's numbers.

    Attributes:
        shape: of the dense weight.
        start: where its kept values, in order, start.
        count: how many there are; as many as the weight has elements where it is dense.
        bits: where the bits that say which are kept start, in bytes.
    """

    shape: tuple[int, ...]
    start: int
    count: int
    bits: int


@dataclass(frozen=True)
class Op:
    """One operation on values; a value is known by its number: first the inputs, then one for every operation, in order.

    Attributes:
        kind: "conv", "linear", "activation", "add", "multiply", "max_pool", "adaptive_pool", "mean", "channels", "flatten",
            "permute", "layer_norm" or "attention".
        inputs: the values that it reads; the last of a conv or linear with two is added to its result.
        name: of the node it stands for.
        weight, bias: of conv, linear and layer_norm. A bias is where its numbers start.
        activation: applied to the result: a name, and two limits for "clamp".
        options: what torch's function of this name takes.
    """

    kind: str
    inputs: tuple[int, ...]
    name: str
    weight: Weight | None = None
    bias: int | None = None
    activation: tuple[str, float, float] = ("none", 0.0, 0.0)
    options: dict[str, Any] | None = None


@dataclass(frozen=True)
class Program:
    """Operations in order.

    Attributes:
        inputs: of each input, whether its channels come last, as in (batch, tokens, features).
        ops: the operations.
        outputs: the values that come out.
    """

    inputs: tuple[bool, ...]
    ops: tuple[Op, ...]
    outputs: tuple[int, ...]

    def to_json(self) -> str:
        """Return a text that says all."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> "Program":
        """Return the program that a text of `to_json` says."""
        given = json.loads(text)
        ops = []
        for op in given["ops"]:
            weight = op["weight"] and Weight(**{**op["weight"], "shape": tuple(op["weight"]["shape"])})
            ops.append(Op(**{**op, "inputs": tuple(op["inputs"]), "weight": weight, "activation": tuple(op["activation"])}))
        return Program(tuple(given["inputs"]), tuple(ops), tuple(given["outputs"]))
