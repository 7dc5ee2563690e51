"""The resnet18 rows for rigl-torch 0.5.2. Runs in an environment of its own and prints one line of JSON."""

import argparse
import json
from dataclasses import asdict

import torch
from rigl_torch.RigL import RigLScheduler
from workload import (
    DENSITY,
    FOREVER,
    Trainer,
    dense_trainer,
    interleave,
    ratio,
    sgd,
    small_batch,
    small_model,
    timed,
    timed_update,
)


def trainer(**schedule: object) -> Trainer:
    """A model under a `RigLScheduler`, stepped the way rigl-torch documents: `if pruner(): optimizer.step()`."""
    model = small_model()
    optimizer = sgd(model)
    pruner = RigLScheduler(
        model, optimizer, dense_allocation=DENSITY, T_end=FOREVER, ignore_linear_layers=False, **schedule
    )

    def take_step() -> None:
        if pruner():
            optimizer.step()

    return Trainer(model, optimizer, small_batch(), take_step)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    repeats = parser.parse_args().repeats
    cases = {
        "dense": timed(dense_trainer(small_model(), small_batch()).step),
        "masked": timed(trainer(static_topo=True, delta=FOREVER).step),
        "update": timed_update(trainer(delta=2)),
    }
    seconds = interleave(cases, repeats)
    figures = {name: asdict(ratio(seconds, name, "dense")) for name in ("masked", "update")}
    print(json.dumps({"torch": torch.__version__, **figures}))


if __name__ == "__main__":
    main()
