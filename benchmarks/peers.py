"""Other libraries, in an environment of their own: what they cost beside this one, and what they do."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from environment import build, python_of
from tabulate import tabulate
from workload import Ratio, shown

HERE = Path(__file__).parent
PEERS = {"rigl-torch": "0.5.2", "sparselab": "0.2.2", "nncf": "3.4.0"}
VENV = HERE.parent / ".venv-peers"
PYTHON = python_of(VENV)
PACKAGES = [*(f"{name}=={version}" for name, version in PEERS.items()), "torchvision"]
IMPORTS = ["rigl_torch.RigL", "sparselab", "nncf", "torchvision"]


def measure(repeats: int) -> dict[str, dict[str, Any]]:
    """Run `peer.py` for every library, this one included, one after the other; {library: its figures}."""
    found = {"sparsify": _figures(sys.executable, "sparsify", repeats)}
    if problem := build(VENV, PACKAGES, IMPORTS):
        print(f"Skipped other libraries: {problem}", file=sys.stderr)
        return found
    return found | {name: _figures(PYTHON, name, repeats) for name in PEERS}


def _figures(python: str | Path, library: str, repeats: int) -> dict[str, Any]:
    command = [python, HERE / "peer.py", library, "--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"benchmarks/peer.py {library} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def ratio_table(found: dict[str, dict[str, Any]]) -> str:
    """The times, each over the dense step of its own process."""
    workloads = found["sparsify"]["times"]
    rows = []
    for workload in workloads:
        for key, name in (("masked", "masked step"), ("update", "update")):
            times = [figures["times"][workload].get(key) for figures in found.values()]
            rows.append((f"{workload}: {name} / dense step", *(shown(Ratio(**t)) if t else "-" for t in times)))
    return tabulate(rows, ["time", *_heads(found)], "github", disable_numparse=True)


def feature_table(found: dict[str, dict[str, Any]]) -> str:
    """What every library does, each cell from running it (`features.py`)."""
    rows = [(name, *(figures["features"][name] for figures in found.values())) for name in found["sparsify"]["features"]]
    return tabulate(rows, ["feature", *_heads(found)], "github", disable_numparse=True)


def _heads(found: dict[str, dict[str, Any]]) -> list[str]:
    return [f"{name} {figures.get('library', '')} (torch {figures['torch']})" for name, figures in found.items()]
