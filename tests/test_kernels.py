"""Native loops: equal to torch's operations bit for bit, and absent without harm."""

import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from forks import python
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from passes.kernels import compiler
from passes.masking.zeros import zero_dropped_
from sparsify import sparsify

needs_compiler = pytest.mark.skipif(compiler.native() is None, reason="there is no C++ compiler here")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
USE = """
import sys, torch
from passes.masking.zeros import zero_dropped_
from passes.kernels.compiler import native
x = torch.arange(100000.0)
zero_dropped_(x, torch.arange(100000) % 3 == 0)
assert torch.equal(x, torch.where(torch.arange(100000) % 3 == 0, torch.arange(100000.0), 0))
print("native" if native() else "torch")
"""


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 300) | st.sampled_from([32767, 32768, 32769, 100003]),
    dtype=st.sampled_from(DTYPES),
    threads=st.sampled_from([1, 2, 3]),
    density=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_loops_equal_torch(count: int, dtype: torch.dtype, threads: int, density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator).to(dtype)
    x[::7] = torch.nan
    x[3::11] = -0.0
    mask = torch.rand(count, generator=generator) < density
    expected = torch.where(mask, x, torch.zeros((), dtype=dtype))
    library = compiler.native()
    assert library is not None
    library.sparsify_zero_dropped(x.data_ptr(), mask.data_ptr(), count, x.element_size(), threads)
    assert torch.equal(bits(x), bits(expected))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype: torch.dtype) -> None:
    for make in (
        lambda t: t,
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.transpose(0, 1),
        lambda t: t[:, ::2],
        lambda t: t[1:],
    ):
        x, mask = make(torch.randn(6, 4, 5, 3).to(dtype)), make(torch.rand(6, 4, 5, 3) < 0.5)
        expected = torch.where(mask, x, torch.zeros((), dtype=dtype))
        version = x._version
        assert torch.equal(zero_dropped_(x, mask), expected)
        assert x._version > version  # so that autograd and watches see the write


def test_fake_tensors_and_transforms_are_left_to_torch() -> None:
    with FakeTensorMode():
        zero_dropped_(torch.empty(40000), torch.ones(40000, dtype=torch.bool))
    model = sparsify(nn.Sequential(nn.Linear(4, 3)), 0.5)
    model.updater.attach(torch.optim.SGD(model.parameters(), 0.1), total_steps=1000)
    parameters = dict(model.named_parameters())

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, p, (x,)).square().sum()

    x = torch.randn(5, 1, 4)
    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)["0.weight"]
    one_by_one = torch.stack([torch.func.grad(loss)(parameters, row)["0.weight"] for row in x])
    torch.testing.assert_close(grads, one_by_one)


# Compilers and caches


REMEMBERING = """#!/bin/sh
if [ "$1" = --version ]; then exec "$REAL" --version; fi
for output; do :; done
if [ -f "$KEPT" ]; then exec cp "$KEPT" "$output"; fi
"$REAL" "$@" && cp "$output" "$KEPT.$$" && mv "$KEPT.$$" "$KEPT"
"""


@pytest.fixture(scope="session")
def compiler_that_remembers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The compiler, which compiles once and brings the same again: seconds for every test."""
    if compiler.native() is None:
        return {}
    folder = tmp_path_factory.mktemp("compiler")
    (folder / "g++").write_text(REMEMBERING)
    (folder / "g++").chmod(0o755)
    return {"CXX": str(folder / "g++"), "REAL": compiler._compiler()[0], "KEPT": str(folder / "kept.so")}


@pytest.fixture
def environment(tmp_path: Path, compiler_that_remembers: dict[str, str]) -> dict[str, str]:
    """Of a process with a cache of its own."""
    return {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), **compiler_that_remembers}


def run(environment: dict[str, str], code: str = USE) -> tuple[str, str]:
    return python([code], environment)[0]


def libraries(environment: dict[str, str]) -> list[Path]:
    return sorted((Path(environment["XDG_CACHE_HOME"]) / "sparsify-fx").glob("*.so"))


@needs_compiler
def test_it_is_built_once_in_a_private_directory(environment: dict[str, str]) -> None:
    used, said = run(environment)
    assert used == "native"
    assert said.count("compiling native loops") == 1
    (library,) = libraries(environment)
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o700
    assert run(environment) == ("native", "")
    assert libraries(environment) == [library]


@needs_compiler
def test_a_damaged_library_is_built_again(environment: dict[str, str]) -> None:
    run(environment)
    (library,) = libraries(environment)
    library.write_bytes(library.read_bytes()[:-100])
    used, said = run(environment)
    assert used == "native"
    assert "compiling" in said


@needs_compiler
@pytest.mark.parametrize("what", ["others may write", "a link", "a file"])
def test_a_directory_that_is_not_private_is_not_used(environment: dict[str, str], tmp_path: Path, what: str) -> None:
    cache = Path(environment["XDG_CACHE_HOME"])
    cache.mkdir()
    place = cache / "sparsify-fx"
    if what == "others may write":
        place.mkdir()
        place.chmod(0o777)
    elif what == "a link":
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to(tmp_path / "elsewhere")
    else:
        place.write_text("")
    assert run(environment)[0] == "native"
    assert not libraries(environment)
    assert not list(tmp_path.rglob("elsewhere/*"))


COMPILERS = {  # what they do when they are to compile
    "none": None,
    "one that fails": "echo broken >&2; exit 1",
    "one that crashes": "kill -SEGV $$",
    "one that writes rubbish": 'for a; do :; done; echo rubbish > "$a"',
}


@pytest.mark.parametrize("what", COMPILERS)
def test_without_a_compiler_that_works_torch_runs(environment: dict[str, str], tmp_path: Path, what: str) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "kill"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    if act := COMPILERS[what]:
        (tools / "g++").write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo 1; else {act}; fi\n')
        (tools / "g++").chmod(0o755)
    used, said = run({**environment, "PATH": str(tools), "CXX": ""})
    assert used == "torch"
    assert said.count("no native loops, torch's operations run instead") == 1


def test_it_can_be_turned_off(environment: dict[str, str]) -> None:
    assert run({**environment, "SPARSIFY_NATIVE": "0"}) == ("torch", "")


@needs_compiler
def test_several_processes_build_at_once(environment: dict[str, str]) -> None:
    assert [used for used, _ in python([USE] * 3, environment)] == ["native"] * 3
    assert len(libraries(environment)) == 1


@needs_compiler
def test_a_fork_after_first_use(environment: dict[str, str]) -> None:
    fork = (
        "import os\npid = os.fork()\nif pid == 0:\n    torch.set_num_threads(1)\n    zero_dropped_(x, x > 5)\n    os._exit(0)\n"
    )
    used, _ = run(environment, USE + fork + "assert os.waitpid(pid, 0)[1] == 0\n")
    assert used == "native"
