"""What is asked of a sparsified model: the same results, all weights found, exact counts, training that keeps masks."""

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy
import torch
from foreign_products import Products, torch_macs
from torch import Tensor, nn

from passes import masks_of
from passes.capture.copies import copied
from sparsify import FlopReport, RigL, flop_report, fold, sparsify

DENSITY, STEPS = 0.3, 8


class Skipped(Exception):  # noqa: N818
    """The dense model itself cannot be checked; the message says why."""


@dataclass
class Run:
    """What one forward and backward pass gave."""

    kinds: list[type]  # of the result and of all that is in it
    outputs: list[Tensor]
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)


def check(make: Callable[[], nn.Module], inputs: Any) -> dict[str, str]:
    """Run all checks on a model; {check: what is wrong, "" if nothing}. Raises `Skipped` where the dense model does not run."""
    subject = Subject(make(), inputs)
    return {name: subject.check(name) for name in CHECKS}


class Subject:
    """A model, inputs that it takes, and its sparse copies."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model, self.inputs, self.notes = model, inputs, []
        self.exact = self._is_exact()

    def check(self, name: str) -> str:
        """Run one check; what is wrong, "" if nothing."""
        try:
            return CHECKS[name](self)
        except Exception as error:  # whatever the library raises is a finding
            text = str(error).strip() or "no message"
            return f"{'refused' if type(error) is ValueError else type(error).__name__}: {text.splitlines()[0]}"

    @cached_property
    def sparse(self) -> nn.Module:
        """The model with static masks."""
        return sparsify(copied(self.model), DENSITY, method="static", inputs=self.inputs)

    @cached_property
    def report(self) -> FlopReport:
        """The counts of `sparse`."""
        return flop_report(self.sparse, self.inputs)

    @cached_property
    def products(self) -> set[str]:
        """The names of the parameters that are operands of products, in either mode."""
        seen = Products(self.model)
        for training in (False, True):
            with seen:
                run(self.model, self.inputs, training, backward=False)
        return seen.multiplied

    def _is_exact(self) -> bool:
        """Say whether two dense runs agree bit for bit; raise `Skipped` where they do not agree at all."""
        exact = True
        for training in (True, False):
            first, second = (run(copied(self.model), self.inputs, training) for _ in range(2))
            if not first.outputs:
                raise Skipped("no floating output")
            if difference(first, second, exact=False):
                raise Skipped(f"not deterministic: {difference(first, second, exact=False)}")
            exact = exact and not difference(first, second, exact=True)
        return exact


def run(model: nn.Module, inputs: Any, training: bool, backward: bool = True) -> Run:
    """Run a model once, and backward from the mean square of its outputs."""
    model.train(training).zero_grad()
    result = call(model, inputs)
    values = list(walk(result))
    outputs = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    if backward and (loss := loss_of(outputs)).requires_grad:
        loss.backward()
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    return Run([type(v) for v in values], [t.detach() for t in outputs], gradients, buffers)


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model with the same random numbers each time and a copy of its inputs, as `flop_report` takes them."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    inputs = copy.deepcopy(inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def walk(value: Any) -> Iterator[Any]:
    """Yield a result and all that is inside its containers."""
    yield value
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from walk(item)


def loss_of(outputs: list[Tensor]) -> Tensor:
    """Return the mean square of each output, summed up."""
    return sum((t.float().square().mean() for t in outputs if t.numel()), torch.zeros(()))


def difference(expected: Run, got: Run, exact: bool) -> str:
    """Say what differs first between two runs, "" if nothing does; masks are not expected in buffers."""
    if expected.kinds != got.kinds:
        pairs = zip(expected.kinds, got.kinds, strict=False)
        first = next(((a.__name__, b.__name__) for a, b in pairs if a is not b), ("some", "fewer or more"))
        return f"returns {first[1]} instead of {first[0]}"
    for i, (a, b) in enumerate(zip(expected.outputs, got.outputs, strict=True)):
        if off := _off(a, b, exact):
            return f"output {i} {off}"
    for name, gradient in expected.gradients.items():
        if off := _off(gradient, got.gradients[name], exact=False):
            return f"gradient of {name} {off}"
    for name, buffer in expected.buffers.items():
        if off := _off(buffer, got.buffers.get(name), exact):
            return f"buffer {name} {off}"
    return ""


def _off(a: Tensor | None, b: Tensor | None, exact: bool) -> str:
    if a is None or b is None:
        return "" if a is b else f"is {'there' if a is None else 'missing'}"
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"is {b.dtype} {tuple(b.shape)} instead of {a.dtype} {tuple(a.shape)}"
    if a.numel() == 0 or torch.equal(a, b):
        return ""
    scale = float(a.abs().nan_to_num(0, 0, 0).max()) if a.is_floating_point() else 0.0
    if torch.allclose(a, b, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5 * scale, equal_nan=True):
        return ""
    return f"off by {float((a.double() - b.double()).abs().max()):.2g} of {scale:.2g}"


def same(subject: Subject) -> str:
    """At density 1 the sparsified model is the dense one: outputs, their types, gradients and buffers."""
    for options in ({}, {"inputs": subject.inputs}):
        try:
            sparse = sparsify(copied(subject.model), 1.0, method="static", **options)
            break
        except ValueError as error:
            if options:
                raise
            subject.notes.append(f"needs inputs=: {str(error).splitlines()[0]}")
    dense = copied(subject.model)
    for training in (True, False):
        expected, got = (run(m, subject.inputs, training) for m in (dense, sparse))
        if wrong := difference(expected, got, subject.exact):
            return f"{'train' if training else 'eval'}: {wrong}"
    return ""


def coverage(subject: Subject) -> str:
    """Every parameter that a product reads is masked, or the report names it with a reason."""
    told = {name for name, why in subject.report.coverage.items() if why == "masked" or ": " in why}
    missing = sorted(subject.products - told)
    return f"{len(missing)} weights without a mask or a reason: {', '.join(missing[:3])}" if missing else ""


def macs(subject: Subject) -> str:
    """The dense MACs are half of what torch counts, and what torch does not count is told apart."""
    counted, apart = torch_macs(copied(subject.model).eval(), subject.inputs, call)
    torch.manual_seed(0)
    found = flop_report(copied(subject.model), subject.inputs).dense_macs
    if apart:
        subject.notes.append(f"torch does not count {', '.join(apart)}")
    expected = counted + sum(apart.values())
    return "" if found == expected else f"{found:,} instead of {expected:,} MACs"


def masked(subject: Subject) -> str:
    """Dropped weights have no gradient in training, and no effect in evaluation whatever is in them."""
    sparse = copied(subject.sparse)
    gradients = run(sparse, subject.inputs, True).gradients
    kept = {name: mask.mask for name, mask in masks_of(sparse).items()}
    leaks = [n for n, m in kept.items() if (g := gradients[n]) is not None and (g[~m] != 0).any()]
    if leaks:
        return f"{len(leaks)} masked weights have dense gradients: {', '.join(leaks[:3])}"
    expected = run(sparse, subject.inputs, False).outputs
    with torch.no_grad():
        for name, mask in kept.items():
            sparse.get_parameter(name)[~mask] = 7.0
    got = run(sparse, subject.inputs, False).outputs
    off = next((o for a, b in zip(expected, got, strict=True) if (o := _off(a, b, subject.exact))), "")
    return f"evaluation reads dropped weights: {off}" if off else ""


def train(subject: Subject) -> str:
    """Over some steps with updates, counts stay, dropped weights stay 0, and weights stay finite."""
    method = RigL(interval=2)
    sparse = sparsify(copied(subject.model), DENSITY, method=method, inputs=subject.inputs).train()
    optimizer = torch.optim.SGD(sparse.parameters(), 0.01)
    counts = dict(sparse.updater.nonzeros)
    sparse.updater.attach(optimizer, total_steps=2 * STEPS)
    for step in range(STEPS):
        _step(sparse, optimizer, subject.inputs)
        kept = {name: mask.mask for name, mask in masks_of(sparse).items()}
        if strays := [n for n, m in kept.items() if sparse.get_parameter(n)[~m].any()]:
            return f"dropped weights are not 0 after step {step + 1}: {', '.join(strays[:3])}"
        if counts != {name: int(mask.sum()) for name, mask in kept.items()} or counts != dict(sparse.updater.nonzeros):
            return f"counts changed in step {step + 1}"
    if _finite(sparse) or not _finite(_trained(subject)):
        return ""
    return "weights are not finite, and dense training keeps them so"


def _trained(subject: Subject) -> nn.Module:
    dense = copied(subject.model).train()
    optimizer = torch.optim.SGD(dense.parameters(), 0.01)
    for _ in range(STEPS):
        _step(dense, optimizer, subject.inputs)
    return dense


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Any) -> None:
    optimizer.zero_grad()
    loss_of([v for v in walk(call(model, inputs)) if isinstance(v, Tensor) and v.is_floating_point()]).backward()
    optimizer.step()


def _finite(model: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters())


def keep(subject: Subject) -> str:
    """Copies, loaded states and folded models give what the sparse model gives."""
    sparse = subject.sparse
    fresh = copied(subject.model)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.mul_(0.5)
    fresh = sparsify(fresh, DENSITY, method="static", inputs=subject.inputs, seed=1)
    fresh.load_state_dict(sparse.state_dict(), strict=True)
    expected = run(sparse, subject.inputs, False, backward=False)
    for name, other, exact in (("a copy", copy.deepcopy(sparse), True), ("a loaded model", fresh, True)):
        if wrong := _differs(expected, other, subject, exact):
            return f"{name}: {wrong}"
    wrong = _differs(expected, fold(sparse), subject, False)
    return f"a folded model: {wrong}" if wrong else ""


def _differs(expected: Run, model: nn.Module, subject: Subject, exact: bool) -> str:
    got = run(model, subject.inputs, False, backward=False)
    expected, got = (Run(r.kinds, r.outputs) for r in (expected, got))
    return difference(expected, got, exact and subject.exact)


CHECKS: dict[str, Callable[[Subject], str]] = {
    "same": same,
    "coverage": coverage,
    "macs": macs,
    "masked": masked,
    "train": train,
    "keep": keep,
}
