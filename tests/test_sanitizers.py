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
from test_whole import Timm
from torch import Tensor, nn
from torch.nn import functional as F

from passes.kernels import compiler
from passes.kernels.costs import Machine
from passes.kernels.parts import forward_sum, input_sum
from passes.kernels.windows import Kept, Lying, Window
from passes.lowering.plan import plan
from passes.lowering.program import Program
from passes.lowering.segment import Segment
from sparsify import lower

GXX = shutil.which("g++")
SOURCE = Path(__file__).with_name("sanitized.cpp")
SANITIZERS = ["address,undefined", "thread"]
MODELS = ["stem", "depthwise", "dilated and strided", "dense joins", "a gate", "channels last inside", "classifier", "ceil"]
SUMS = {  # weight, what `Window` takes, images
    "3x3": ((8, 6, 3, 3), {"padding": (1, 1)}, 5),
    "strided": ((8, 6, 3, 3), {"stride": (2, 2), "padding": (1, 1)}, 5),
    "dilated, one image": ((8, 6, 3, 2), {"dilation": (2, 1)}, 1),
    "depthwise": ((6, 1, 3, 3), {"padding": (1, 1), "groups": 6}, 4),
    "1x1": ((16, 6, 1, 1), {}, 7),
}
THREADS = 3
NARROW = Machine(4, {1: 14, 2: 6, 4: 3}, 32768)


class Recorder:
    """Takes the place of the native library, to write down what it would be given."""

    def sparsify_plan(self, steps: Any, count: int, floats: int, split: int) -> int:
        self.steps, self.sizes = steps, [floats, split]
        return 0

    def sparsify_order(self, order: Any, threads: int) -> None:
        compiler.native().sparsify_order(order, threads)  # type: ignore[union-attr]

    def sparsify_forget(self, handle: int) -> None:
        """Nothing was made."""


def write(path: Path, kind: int, records: Any, arrays: list[np.ndarray], *others: np.ndarray) -> None:
    """Write records whose pointers lead into some arrays, and what else is needed."""
    pointers = [name for name, field in type(records)._type_._fields_ if field is ctypes.c_void_p]
    begins = np.cumsum([0, *(array.nbytes for array in arrays)])
    for record in records:
        for name in pointers:
            address = getattr(record, name)
            own = ((address or 0) - array.ctypes.data for array in arrays)
            inside = [b + d + 1 for array, b, d in zip(arrays, begins, own, strict=False) if 0 <= d < max(1, array.nbytes)]
            assert bool(inside) == bool(address)
            setattr(record, name, int(inside[0]) if inside else None)
    places = [getattr(type(records)._type_, name).offset for name in pointers]
    tables = b"".join(array.tobytes() for array in arrays)
    head = np.array([kind], np.int64).tobytes()
    vectors = [head, bytes(records), np.array(places, np.int64).tobytes(), tables, *(other.tobytes() for other in others)]
    path.write_bytes(b"".join(len(vector).to_bytes(8, sys.byteorder) + vector for vector in vectors))


def write_plan(path: Path, model: nn.Module, x: Tensor, machine: Machine) -> None:
    """Write a lowered model's plan, its input and its output."""
    segment = next(m for m in lower(model, x, backend="native").modules() if isinstance(m, Segment))
    recorder = Recorder()
    made = plan(Program.from_json(segment.program), [x.shape], segment.values, segment.bits, recorder, machine)  # type: ignore
    with torch.no_grad():
        expected = model(x).contiguous().numpy()
    sizes = np.array([*recorder.sizes, made.images], np.int64)
    write(path, 0, recorder.steps, [np.frombuffer(made.native._tables, np.uint8)], sizes, x.contiguous().numpy(), expected)


def write_sums(folder: Path, name: str, machine: Machine, last: bool) -> list[Path]:
    """Write a layer's output, and the gradients of its input and weight, as sums with what they are of."""
    shape, options, images = SUMS[name]
    window, lying = Window(**options), torch.channels_last if last else torch.contiguous_format
    mask = torch.rand(shape) < 0.4
    weight = (torch.randn(shape) * mask).contiguous(memory_format=lying).requires_grad_()
    x = torch.randn(images, shape[1] * window.groups, 9, 11).contiguous(memory_format=lying).requires_grad_()
    y = F.conv2d(x, weight, None, window.stride, window.padding, window.dilation, window.groups)
    grad = torch.randn_like(y).contiguous(memory_format=lying)
    y.backward(grad)
    kept = Kept.of(mask.numpy(), window.groups, last)
    given = (compiler.native(), kept, window, Lying.of(x), Lying.of(grad), machine)
    y, of_weight = y.contiguous(memory_format=lying), torch.where(mask, weight.grad, 0).contiguous(memory_format=lying)
    cases = (
        (1, forward_sum(*given, {}), x, weight, y),
        (1, input_sum(*given, {}), grad, weight, x.grad.contiguous(memory_format=lying)),
        (2, forward_sum(*given, {}, gradient=True), x, grad, of_weight),
    )
    paths = []
    for number, (kind, prepared, *tensors) in enumerate(cases):
        arrays = [table for own in prepared._tables for table in own.values()]
        flat = [t.detach().as_strided((t.numel(),), (1,)).numpy() for t in tensors]  # as they lie
        paths.append(folder / f"{name}, {'last' if last else 'first'}, {number}")
        write(paths[-1], kind, prepared.records, arrays, *flat)
    return paths


def check(tmp_path: Path, machine: Machine, *flags: str) -> None:
    """Build the program that runs plans and sums, and let it run some, all in one process."""
    native, program = Path(compiler.__file__).parent / "native", tmp_path / "program"
    command = [str(GXX), "-std=c++17", "-O0", "-g", "-Wno-psabi", "-pthread", *flags, f"-I{native}", str(SOURCE), "-ldl"]
    subprocess.run([*command, "-o", str(program)], check=True)
    torch.manual_seed(0)
    plans = {name: (IMAGES[name](), torch.randn(5, 5, 9, 11)) for name in MODELS}
    plans |= {f"attention of {tokens}": (Timm(), torch.randn(5, tokens, 24)) for tokens in (1, 33)}
    for name, (model, x) in plans.items():
        write_plan(tmp_path / name, thin(model, 0.4), x, machine)
    paths = [tmp_path / name for name in plans]
    paths += [path for name in SUMS for last in (False, True) for path in write_sums(tmp_path, name, machine, last)]
    done = subprocess.run([str(program), str(THREADS), *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(GXX is None, reason="there is no g++ here")
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizers_find_nothing(sanitizer: str, tmp_path: Path) -> None:
    check(tmp_path, NARROW, f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")


@pytest.mark.skipif(GXX is None, reason="there is no g++ here")
def test_wide_vectors_compute_the_same(tmp_path: Path) -> None:
    """The vectors of AVX-512, of which the compiler makes several narrow ones where the processor has no such."""
    check(tmp_path, Machine(16, {1: 14, 2: 14, 4: 6}, 32768), "-D__AVX512F__", "-DEMULATED")


@pytest.mark.sweep
@pytest.mark.skipif(GXX is None, reason="there is no g++ here")
def test_nothing_touches_memory_outside_of_tensors(tmp_path: Path) -> None:
    """The tests of layers, norms and attention again, in a process whose native library is built with the sanitizers."""
    libraries = [
        subprocess.run([str(GXX), f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    own = {"LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "XDG_CACHE_HOME": str(tmp_path)}
    own["CXX"] = f"{GXX} -fsanitize=address,undefined -fno-sanitize-recover=all"
    tests = [str(Path(__file__).with_name(f"test_{name}.py")) for name in ("training_kernels", "whole")]
    which = "test_layers or test_norms or test_linear or test_masks or test_heads"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", which, *tests]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
