"""Ledger: what a run has cost, asked for by a model and its inputs."""

from typing import Any

from torch import nn

from sparsify.costs.flops import flop_report
from sparsify.costs.spent import CostLedger, ledger_of
from sparsify.training.lookup import updater_of


def cost_ledger(model: nn.Module, inputs: Any) -> CostLedger:
    """Add up what training has cost so far, from the schedule and the masks that the run really had.

    Args:
        model: sparsified, its updater attached.
        inputs: what `flop_report` takes.

    Returns:
        The ledger; `print` shows it as a table.

    Raises:
        ValueError: the model has no updater, or no step has been taken since `attach`.

    Example:
        >>> import torch
        >>> from sparsify import sparsify
        >>> model = sparsify(torch.nn.Sequential(torch.nn.Linear(10, 10)), density=0.5, method="set")
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model.updater.attach(optimizer, total_steps=200)
        >>> for _ in range(200):
        ...     model(torch.ones(1, 10)).sum().backward()
        ...     optimizer.step()
        >>> cost_ledger(model, (1, 10)).training_ratio
        0.5
    """
    updater = updater_of(model)
    if updater is None or not updater.step:
        raise ValueError("cost_ledger() takes a model that sparsify() returned, attached and trained for a step at least.")
    return ledger_of(model, flop_report(model, inputs))
