"""Check models one after the other: reads [package, name] lines, writes JSON lines. Started by foreign.py."""

import json
import os
import resource
import sys
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from foreign_attempts import Make
from foreign_checks import CHECKS, Skipped, Subject
from foreign_packages import PACKAGES

from passes import graphs

MEMORY = 12 << 30  # bytes; a model that wants more gets an error instead of the machine

Say = Callable[..., None]


@cache
def models(package: str) -> dict[str, Make]:
    """Return how to make each model of a package."""
    return PACKAGES[package]()


def examine(package: str, name: str, say: Say) -> dict[str, Any]:
    """Make a model and run all checks; {"skipped": why} where it does not run densely."""
    try:
        model, inputs = models(package)[name]()
        say(stage="dense")
        subject = Subject(model, inputs)
    except Skipped as error:
        return {"skipped": str(error)}
    except Exception as error:  # whatever keeps a model from running is a reason to skip it
        return {"skipped": f"{type(error).__name__}: {str(error).strip()}"[:300].splitlines()[0]}
    failed = {}
    for check in CHECKS:
        say(stage=check)
        if message := subject.check(check):
            failed[check] = message
    return {"class": type(model).__name__, "failed": failed, "notes": subject.notes, **_figures(subject)}


def _figures(subject: Subject) -> dict[str, Any]:
    """Return sizes of the model, and how much of what products read is masked; nothing where it cannot be made sparse."""
    parameters = dict(subject.model.named_parameters())
    figures = {"parameters": sum(p.numel() for p in parameters.values())}
    try:
        masks = subject.sparse.updater.masks
        read = subject.products
        masked = [parameters[name].numel() for name in read if name in masks]
        share = sum(masked) / max(1, sum(parameters[name].numel() for name in read))
        counts = {"multiplied": len(read), "masked": len(masked), "share": share}
        return figures | counts | {"graphs": len(graphs(subject.sparse)), "macs": subject.report.dense_macs}
    except Exception:  # a failed check has told why
        return figures


def main() -> None:
    """Answer until there are no more questions."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what models print is no answer
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)  # whole encoders in one operation, which no counter looks into
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))

    def say(**message: Any) -> None:
        print(json.dumps(message), file=answers, flush=True)

    say(ready=True)
    for line in sys.stdin:
        say(**examine(*json.loads(line), say))


if __name__ == "__main__":
    main()
