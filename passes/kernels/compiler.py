"""Compiler: the native library, built once for this CPU and kept in a private directory.

A compiler is the one that CXX names, g++, clang++ or c++, or the one in the package ziglang. Without any, or where something
fails, callers use torch's operations; a line on stderr says so, once.
"""

import atexit
import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

_SOURCE = Path(__file__).parent / "native" / "native.cpp"
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC")


@functools.cache
def native() -> ctypes.CDLL | None:
    """Return the native library, built if need be; None where there is none, or SPARSIFY_NATIVE=0 asks for none."""
    if os.environ.get("SPARSIFY_NATIVE") == "0":
        return None
    try:
        return _load(_built())
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        print(f"sparsify: no native loops, torch's operations run instead: {error}", file=sys.stderr)
        return None


def native_for(operator: str) -> ctypes.CDLL:
    """Return the native library for an operator that is only called where there is one."""
    library = native()
    if library is None:
        raise RuntimeError(f"sparsify::{operator} needs the native loops, and the model was compiled where there were some.")
    return library


def threads() -> int:
    """Return how many threads a loop may use: as many as torch does, and one in a forked process, where its pool is gone."""
    return 1 if _FORKED else torch.get_num_threads()


_FORKED: list[bool] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _FORKED.append(True))


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    found = next((path for name in (*named[:1], "g++", "clang++", "c++") if (path := shutil.which(name))), None)
    if found:
        return [found, *(named[1:] if named and found == shutil.which(named[0]) else [])]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++"]
    raise ValueError("there is no C++ compiler; pip install 'sparsify-fx[kernels]' brings one")


def _built() -> Path:
    """Return the library of this source, compiler and CPU, after its content was checked."""
    command = _compiler()
    version = subprocess.run([*command, "--version"], capture_output=True, check=True, timeout=60).stdout
    sources = [path.read_bytes() for path in sorted(_SOURCE.parent.iterdir())]
    facts = [*sources, version, " ".join([*command, *_FLAGS]).encode(), _cpu()]
    key = hashlib.sha256(b"\0".join(facts)).hexdigest()[:24]
    folder = _cache()
    for path in folder.glob(f"{key}-*.so"):
        if path.is_file() and not path.is_symlink() and path.stem == f"{key}-{_digest(path)}":
            return path
    print(f"sparsify: compiling native loops for this CPU, once, into {folder}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        built = Path(partial) / "native.so"
        done = subprocess.run([*command, *_FLAGS, str(_SOURCE), "-o", str(built)], capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise ValueError(f"{command[0]} failed: {done.stderr.strip().splitlines()[-1:] or done.returncode}")
        place = folder / f"{key}-{_digest(built)}.so"
        os.replace(built, place)  # at once: another process may be doing the same
    return place


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:24]


def _cpu() -> bytes:
    """Return what says which instructions the CPU has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    wanted = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join([platform.machine(), platform.processor(), *sorted(set(wanted))]).encode()


def _cache() -> Path:
    """Return a directory that this user alone may write to: the kept one, or else one of this process."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "sparsify-fx"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.lstat()
        if (
            stat.S_ISDIR(facts.st_mode)
            and facts.st_uid == os.getuid()
            and not facts.st_mode & 0o022
            and os.access(folder, os.W_OK)
        ):
            return folder
    except OSError:
        pass
    return _own_folder()


@functools.cache
def _own_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="sparsify-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _load(path: Path) -> ctypes.CDLL:
    """Load a library and try it, so that one that does not work here is not used."""
    library = ctypes.CDLL(str(path))
    pointer, integer, long = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    for name, result, arguments in (
        ("zero_dropped", None, (pointer, pointer, long, integer, integer)),
        ("has_stray", integer, (pointer, pointer, long, integer)),
        ("select", integer, (pointer, pointer, long, long, integer, integer, pointer, integer)),
        ("order", None, (pointer, integer)),
        ("plan", pointer, (pointer, long, long, long)),
        ("forget", None, (pointer,)),
        ("run", integer, (pointer, pointer, pointer, long, integer, pointer)),
        ("lanes", integer, ()),
        ("tile", integer, (integer,)),
        ("cache", long, (integer,)),
        ("sum", integer, (pointer, long, pointer, pointer, pointer, pointer, integer)),
        ("sum_gradient", integer, (pointer, pointer, pointer, pointer, integer)),
        ("norm_forward", None, (*[pointer] * 6, integer)),
        ("norm_backward", None, (*[pointer] * 10, integer)),
        ("max_pool_forward", None, (*[pointer] * 4, integer)),
        ("max_pool_backward", None, (*[pointer] * 4, integer)),
    ):
        function = getattr(library, f"sparsify_{name}")
        function.restype, function.argtypes = result, arguments
    for libgomp in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        library.sparsify_use_threads_of(str(libgomp).encode())
    values, mask = torch.arange(1.0, 8.0), torch.arange(7) % 2 == 0
    library.sparsify_zero_dropped(values.data_ptr(), mask.data_ptr(), 7, 4, 1)
    if values.tolist() != [1, 0, 3, 0, 5, 0, 7]:
        raise ValueError(f"{path} does not compute what it should")
    return library
