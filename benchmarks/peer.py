"""The figures of one library, as a line of JSON; peers run in an environment of their own."""

import argparse
import importlib.metadata
import json
from dataclasses import asdict

import torch
from features import cells
from libraries import LIBRARIES, Library, UnsupportedError
from workload import Ratio, Trainer, batch, dense_trainer, interleave, mlp, ratio, sgd, small_model, timed, timed_update

WORKLOADS = {  # name: (model, images or vectors)
    "ResNet-18": (small_model, lambda: batch(16, 32)),
    "MLP of 1024": (lambda: mlp(1024, 1024), lambda: (torch.randn(64, 1024), torch.arange(64) % 10)),
}


def ratios(library: Library, workload: str, repeats: int) -> dict[str, Ratio]:
    """Time a masked step and an update over the dense step; what the library does not support is left out."""
    build, make_data = WORKLOADS[workload]
    data = make_data()

    def trainer(interval: int | None) -> Trainer:
        torch.manual_seed(0)
        training = library(build(), sgd, interval, data[0])
        if not training.masks():
            raise UnsupportedError(f"masks nothing of {workload}")
        return Trainer(training.model, training.optimizer, data, training.take_step)

    cases = {"dense": timed(dense_trainer(build(), data).step)}
    for name, interval, time in (("masked", None, lambda t: timed(t.step)), ("update", 2, timed_update)):
        try:
            cases[name] = time(trainer(interval))
        except UnsupportedError:
            continue
    seconds = interleave(cases, repeats)
    return {name: ratio(seconds, name, "dense") for name in cases if name != "dense"}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    library = LIBRARIES[options.library]
    times = {w: {k: asdict(r) for k, r in ratios(library, w, options.repeats).items()} for w in WORKLOADS}
    versions = {"torch": torch.__version__}
    if options.library != "sparsify":
        versions["library"] = importlib.metadata.version(options.library)
    print(json.dumps({**versions, "times": times, "features": cells(library)}))


if __name__ == "__main__":
    main()
