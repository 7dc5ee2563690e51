"""Processes for tests that fork from a server, which has imported what takes seconds and run nothing."""

import os
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import multiprocessing

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo", "sparsify"])


def python(codes: list[str], environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """Run codes at once, each in a process of its own, in another environment; return what they print, and say of errors."""
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder, str(number)) for number in range(len(codes))]
        given = zip(codes, places, strict=True)
        processes = [SERVER.Process(target=_python, args=(code, dict(environment), place)) for code, place in given]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        files = [path.read_text() for path in sorted(Path(folder).iterdir())]
        assert [process.exitcode for process in processes] == [0] * len(codes), files
        return [(p.with_suffix(".out").read_text().strip(), p.with_suffix(".err").read_text()) for p in places]


def _python(code: str, environment: dict[str, str], place: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(place.with_suffix(suffix), os.O_CREAT | os.O_WRONLY), descriptor)
    warnings.simplefilter("ignore")
    exec(code, {"__name__": "__main__"})


def killed(function: Callable[..., Any], args: tuple[Any, ...], path: Path, seconds: float) -> bool:
    """Run a function in a process, and kill it some seconds after it has written a file; tell whether it was still running."""
    before = _written(path)
    process = SERVER.Process(target=function, args=args)
    process.start()
    while process.is_alive() and _written(path) == before:
        time.sleep(0.005)
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def _written(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0
