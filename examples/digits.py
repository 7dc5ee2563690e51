"""Sparse training on real data: scikit-learn's digits, dense beside static and RigL masks at equal density.

python examples/digits.py            # 3 seeds, densities 0.1, 0.05, 0.02, with and without fan-in rescaling
python examples/digits.py --quick    # 1 seed, one density: under a minute
"""

import argparse
import statistics
from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F
from data import digit_images
from networks import digit_net
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from sparsify import RigL, Static, sparsify

Data = tuple[Tensor, Tensor, Tensor, Tensor]
METHODS = {"static": Static(), "rigl": RigL(interval=20, drop_fraction=0.3)}


def batches(x: Tensor, y: Tensor, epochs: int, seed: int, size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled minibatches, in an order that the seed alone decides."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=generator).split(size):
            yield x[index], y[index]


def accuracy(data: Data, epochs: int, seed: int, density: float | None, method: str, init: str) -> float:
    """Train one network and return its test accuracy in percent; `density` None trains it dense."""
    torch.manual_seed(seed)
    model = digit_net()
    if density is not None:
        model = sparsify(model, density, "erk", method=METHODS[method], init=init, seed=seed)
    train_x, train_y, test_x, test_y = data
    steps = epochs * -(-len(train_x) // 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if density is not None:
        model.updater.attach(optimizer, total_steps=steps)
    for x, y in batches(train_x, train_y, epochs, seed):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return 100 * (model.eval()(test_x).argmax(1) == test_y).float().mean().item()


def main() -> None:
    """Train every combination and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed and one density")
    quick = parser.parse_args().quick
    epochs, seeds = (8, 1) if quick else (20, 3)
    densities, inits = ([0.05], ["fan_in"]) if quick else ([0.1, 0.05, 0.02], ["keep", "fan_in"])
    torch.set_num_threads(1)  # these tensors are too small to share
    runs = [(None, "dense", "keep"), *product(densities, METHODS, inits)]
    data, results = digit_images(), {}
    with tqdm(total=len(runs) * seeds, desc="training", unit="run") as progress:
        for run in runs:
            for seed in range(seeds):
                results.setdefault(run, []).append(accuracy(data, epochs, seed, *run))
                progress.update()
    print(table(results))


def table(results: dict[tuple[float | None, str, str], list[float]]) -> str:
    """Return test accuracies as text: one row per density and initialization, one column per method."""
    dense = _cell(results[None, "dense", "keep"])
    rows = [
        [density, init, dense, *(_cell(results[density, method, init]) for method in METHODS)]
        for density, init in dict.fromkeys((d, init) for d, _, init in results if d is not None)
    ]
    return "test accuracy in percent\n" + tabulate(rows, headers=["density", "init", "dense", *METHODS])


def _cell(values: list[float]) -> str:
    spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


if __name__ == "__main__":
    main()
