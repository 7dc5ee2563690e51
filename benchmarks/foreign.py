"""Check the library against other people's models, and write FOREIGN.md.

    python benchmarks/foreign.py [--write] [--only PATTERN] [--packages a,b] [--limit N] [--workers N] [--answers FILE]

The packages live in an environment of their own, `.venv-foreign`, which is made on first use; the library is the checkout's,
or whatever PYTHONPATH names first. Models are small, without weights, and nothing is downloaded to run them. Each is checked
in a worker process, so that a crash or a hang costs one model. All of them take more than an hour on 2 cores: with --answers,
each answer is kept in a file, and a run that was interrupted goes on from there.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from environment import build, python_of

HERE = Path(__file__).parent
VENV = HERE.parent / ".venv-foreign"
PYTHON = python_of(VENV)
TARGET = HERE / "FOREIGN.md"
INSTALLED = (
    "torch torchvision fvcore numpy tabulate timm transformers diffusers monai pytorchcv vit-pytorch torchrl speechbrain "
    "open_clip_torch ultralytics segmentation-models-pytorch"
).split()
IMPORTS = (
    "torchvision fvcore tabulate timm transformers diffusers monai pytorchcv vit_pytorch torchrl speechbrain open_clip "
    "ultralytics segmentation_models_pytorch"
).split()
Found = dict[tuple[str, str], dict[str, Any]]
SECONDS, MODELS = 150, 40  # of one model; until a worker is replaced
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "YOLO_OFFLINE": "true", "OMP_NUM_THREADS": "1"}


class Worker:
    """A process that checks one model after the other, and is replaced when it has died or grown old."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.checked = 0

    def check(self, package: str, name: str) -> dict[str, Any]:
        """Return what was found of a model; where the process dies, the check that it was at has failed."""
        process, stage = self._ready(), "building"
        print(json.dumps([package, name]), file=process.stdin, flush=True)
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        for line in process.stdout or ():
            answer = json.loads(line)
            if "stage" not in answer:
                timer.cancel()
                return answer
            stage = answer["stage"]
        self.process = None
        why = f"the process ended with {process.wait()}" if timer.is_alive() else f"no answer in {SECONDS} s"
        timer.cancel()
        return {"skipped": why} if stage in ("building", "dense") else {"failed": {stage: why}}

    def close(self) -> None:
        """End the process."""
        if self.process and self.process.stdin:
            self.process.stdin.close()
            self.process.wait()
        self.process = None

    def _ready(self) -> subprocess.Popen[str]:
        if self.checked % MODELS == 0 or (self.process and self.process.poll() is not None):
            self.close()
        if self.process is None:
            command, pipe = [sys.executable, HERE / "foreign_worker.py"], subprocess.PIPE
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
            assert self.process.stdout
            self.process.stdout.readline()  # imports are no part of a model's time
        self.checked += 1
        return self.process


def check_all(names: list[tuple[str, str]], workers: int, answers: Path) -> Found:
    """Check models in worker processes, but those of which a file has an answer; what was found, in the order of the names."""
    lines = answers.read_text().splitlines() if answers.exists() else []
    known: Found = {tuple(name): answer for name, answer in map(json.loads, lines)}
    idle: SimpleQueue[Worker] = SimpleQueue()
    for _ in range(workers):
        idle.put(Worker())

    def one(name: tuple[str, str]) -> dict[str, Any]:
        if name in known:
            return known[name]
        worker = idle.get()
        result = worker.check(*name)
        idle.put(worker)
        with answers.open("a") as file:
            print(json.dumps([name, result]), file=file)
        print("/".join(name), result.get("skipped") or result["failed"] or "ok", file=sys.stderr, flush=True)
        return result

    with ThreadPoolExecutor(workers) as pool:
        found = dict(zip(names, pool.map(one, names), strict=True))
    for _ in range(workers):
        idle.get().close()
    return found


def select(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Return the models that are asked for, as (package, model)."""
    from foreign_packages import PACKAGES

    packages = options.packages.split(",") if options.packages else list(PACKAGES)
    names = [(package, name) for package in packages for name in PACKAGES[package]()]
    chosen = [name for name in names if re.search(options.only, "/".join(name))]
    return chosen[: options.limit]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "an unknown processor")


def report(found: Found, arguments: list[str]) -> str:
    """Return FOREIGN.md."""
    from foreign_checks import CHECKS

    command = " ".join(["python benchmarks/foreign.py", *arguments])
    checks = {name: (test.__doc__ or "").splitlines()[0] for name, test in CHECKS.items()}
    from foreign_report import markdown

    return markdown(found, command, {name: version(name) for name in INSTALLED}, _processor(), checks)


def main() -> int:
    """Go on in the environment of the packages; there, check the models that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {TARGET.name}")
    parser.add_argument("--only", default="", metavar="PATTERN", help="a pattern in package/model")
    parser.add_argument("--packages", default="", help="names with commas between them; all by default")
    parser.add_argument("--limit", type=int, help="check the first of them only")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--answers", type=Path, default=Path(os.devnull), metavar="FILE", help="where answers are kept")
    options = parser.parse_args()
    if Path(sys.prefix) != VENV:
        return _within()
    from foreign_report import failures, totals

    found = check_all(select(options), options.workers, options.answers)
    print(totals(found), failures(found), sep="\n\n")
    if options.write:
        TARGET.write_text(report(found, sys.argv[1:]))
    return 0


def _within() -> int:
    """Run this again in the environment of the packages, with the checkout's library behind what PYTHONPATH names."""
    if problem := build(VENV, INSTALLED, IMPORTS):
        print(f"Skipped: {problem}", file=sys.stderr)
        return 0
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(HERE.parent)])
    return subprocess.run([PYTHON, *sys.argv], env=os.environ | OFFLINE | {"PYTHONPATH": path}).returncode


if __name__ == "__main__":
    sys.exit(main())
