"""The native code under the compiler's sanitizers: no access outside of memory, nothing undefined, no race."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_native_kernels import IMAGES, thin
from torch import Tensor, nn

from passes.kernels import compiler
from passes.kernels.costs import Machine
from passes.kernels.steps import Step
from passes.lowering.plan import plan
from passes.lowering.program import Program
from passes.lowering.segment import Segment
from sparsify import lower

GXX = shutil.which("g++")
SOURCE = Path(__file__).with_name("sanitized.cpp")
POINTERS = [name for name, kind in Step._fields_ if kind is ctypes.c_void_p]
SANITIZERS = ["address,undefined", "thread"]
MODELS = ["stem", "depthwise", "dilated and strided", "dense joins", "a gate", "channels last inside", "classifier", "ceil"]


class Recorder:
    """Takes the place of the native library, to write down what it would be given."""

    def sparsify_plan(self, steps: Any, count: int, floats: int, split: int) -> int:
        self.steps, self.head = steps, [count, floats, split]
        return 0

    def sparsify_forget(self, handle: int) -> None:
        """Nothing was made."""


def write_plan(path: Path, model: nn.Module, x: Tensor, threads: int, machine: Machine) -> None:
    """Write a lowered model's plan, its input and its output."""
    segment = next(m for m in lower(model, x, backend="native").modules() if isinstance(m, Segment))
    recorder = Recorder()
    made = plan(Program.from_json(segment.program), [x.shape], segment.values, segment.bits, recorder, machine)  # type: ignore
    tables = np.frombuffer(made.native._tables, np.uint8)
    for step in recorder.steps:
        for name in POINTERS:
            address = getattr(step, name)
            setattr(step, name, address - tables.ctypes.data + 1 if address else None)
    with torch.no_grad():
        expected = model(x).contiguous().numpy()
    places = [getattr(Step, name).offset for name in POINTERS]
    head = [*recorder.head, made.images, threads, len(tables), len(places), x.numel(), expected.size]
    content = [np.array(head, np.int64).tobytes(), bytes(recorder.steps), np.array(places, np.int64).tobytes()]
    path.write_bytes(b"".join([*content, tables.tobytes(), x.contiguous().numpy().tobytes(), expected.tobytes()]))


def check(tmp_path: Path, machine: Machine, *flags: str) -> None:
    """Build the program that runs plans, and let it run some."""
    native, program, path = Path(compiler.__file__).parent / "native", tmp_path / "program", tmp_path / "plan"
    command = [str(GXX), "-std=c++17", "-O0", "-g", "-pthread", *flags, f"-I{native}", str(SOURCE), "-o", str(program), "-ldl"]
    subprocess.run(command, check=True)
    for name in MODELS:
        torch.manual_seed(0)
        write_plan(path, thin(IMAGES[name](), 0.4), torch.randn(5, 5, 9, 11), 3, machine)
        done = subprocess.run([str(program), str(path)], capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr[-3000:]}"


NARROW = Machine(4, {1: 14, 2: 6, 4: 3}, 32768)


@pytest.mark.skipif(GXX is None, reason="there is no g++ here")
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizers_find_nothing(sanitizer: str, tmp_path: Path) -> None:
    check(tmp_path, NARROW, f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")


@pytest.mark.skipif(GXX is None, reason="there is no g++ here")
def test_wide_vectors_compute_the_same(tmp_path: Path) -> None:
    """The vectors of AVX-512, of which the compiler makes several narrow ones where the processor has no such."""
    check(tmp_path, Machine(16, {1: 14, 2: 14, 4: 6}, 32768), "-D__AVX512F__")


@pytest.mark.sweep
@pytest.mark.skipif(GXX is None, reason="there is no g++ here")
def test_training_touches_no_memory_outside_of_tensors(tmp_path: Path) -> None:
    """The tests of layers and norms again, in a process whose native library is built with the sanitizers."""
    libraries = [
        subprocess.run([str(GXX), f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    own = {"LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "XDG_CACHE_HOME": str(tmp_path)}
    own["CXX"] = f"{GXX} -fsanitize=address,undefined -fno-sanitize-recover=all"
    tests = Path(__file__).with_name("test_training_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", "test_layers or test_norms or test_linear", str(tests)]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
