"""The native code under the compiler's sanitizers: no access outside of memory, nothing undefined, no race."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_native_kernels import IMAGES, thin
from torch import Tensor, nn

from passes.kernels import compiler
from passes.kernels.steps import Step
from passes.lowering.costs import this_machine
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


def write_plan(path: Path, model: nn.Module, x: Tensor, threads: int) -> None:
    """Write a lowered model's plan, its input and its output."""
    segment = next(m for m in lower(model, x, backend="native").modules() if isinstance(m, Segment))
    library, recorder = compiler.native(), Recorder()
    assert library is not None
    machine = this_machine(library.sparsify_lanes(), library.sparsify_sums())
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


@pytest.mark.skipif(GXX is None, reason="there is no g++ here")
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizers_find_nothing(sanitizer: str, tmp_path: Path) -> None:
    native, program = Path(compiler.__file__).parent / "native", tmp_path / "program"
    flags = ["-std=c++17", "-O1", "-g", "-march=native", "-pthread", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    subprocess.run([str(GXX), *flags, f"-I{native}", str(SOURCE), "-o", str(program), "-ldl"], check=True)
    for name in MODELS:
        torch.manual_seed(0)
        path = tmp_path / "plan"
        write_plan(path, thin(IMAGES[name](), 0.4), torch.randn(5, 5, 9, 11), threads=3)
        done = subprocess.run([str(program), str(path)], capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr[-3000:]}"
