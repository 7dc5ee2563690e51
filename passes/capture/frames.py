"""Frames: whose code is running, and what it does next with the value that it is about to get."""

import bisect
import dis
import functools
import sys
from types import CodeType, FrameType, FunctionType, TracebackType

_OTHERS = sys.stdlib_module_names | {"torch", "passes", "sparsify"}


@functools.cache
def is_users(module: str) -> bool:
    """Whether code of a module is the user's: not torch's, Python's or ours."""
    return module.partition(".")[0] not in _OTHERS


def module_of(frame: FrameType) -> str:
    """Return the name of the module whose code a frame runs."""
    return frame.f_globals.get("__name__") or ""


def is_generated(frame: FrameType) -> bool:
    """Whether a frame runs code that fx made of a graph."""
    return frame.f_code.co_filename.startswith("<eval_with_key>")


def module_of_code(function: FunctionType) -> str:
    """Return the name of the module that a function's own code is in, which `functools.wraps` hides."""
    return function.__globals__.get("__name__") or ""


def user_frame() -> FrameType | None:
    """Return the innermost running frame of the user's code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_users(module_of(frame)):
        frame = frame.f_back
    return frame


def failing_place(error: BaseException) -> str:
    """Return file and line of the user's code in which an exception arose, as far in as it goes."""
    found, traceback = "", error.__traceback__
    while isinstance(traceback, TracebackType):
        if is_users(module_of(traceback.tb_frame)):
            found = f"{traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return found


def is_compared_by_identity(frame: FrameType) -> bool:
    """Whether the value that a frame is about to get is compared to None or another constant by `is`.

    No proxy can answer that. The value is what the running call, subscript or attribute returns, or one of those that it is
    unpacked into.
    """
    code = _instructions(frame.f_code)
    unpacked = 0
    for following in code[bisect.bisect_left(code, frame.f_lasti, key=lambda x: x.offset) :]:
        if following.offset == frame.f_lasti and following.opname != "UNPACK_SEQUENCE":
            continue
        if _tests_identity(following.opname):
            return True
        if following.opname == "UNPACK_SEQUENCE":
            unpacked = following.argval
        elif following.opname.startswith("STORE_FAST"):
            names = following.argval if isinstance(following.argval, tuple) else (following.argval,)
            if _tested_names(frame.f_code).intersection(names):
                return True
            unpacked -= len(names)
            if unpacked <= 0:
                return False
        elif following.opname != "LOAD_CONST":  # of `is None`
            return False
    return False


@functools.cache
def matches_classes(code: CodeType) -> bool:
    """Whether a function has `match` statements that go by the class of a value, which no proxy can answer."""
    return any(i.opname in ("MATCH_CLASS", "MATCH_SEQUENCE", "MATCH_MAPPING") for i in _instructions(code))


def _tests_identity(opname: str) -> bool:
    return opname == "IS_OP" or opname.endswith(("IF_NONE", "IF_NOT_NONE"))


@functools.cache
def _tested_names(code: CodeType) -> frozenset[str]:
    """Return the local variables of a function that it compares by identity."""
    names, loaded = set(), []
    for instruction in _instructions(code):
        if _tests_identity(instruction.opname):
            names.update(loaded)
        elif instruction.opname.startswith(("LOAD_FAST", "STORE_FAST_LOAD_FAST")):
            loaded = list(instruction.argval) if isinstance(instruction.argval, tuple) else [instruction.argval]
        elif instruction.opname not in ("LOAD_CONST", "COPY"):
            loaded = []
    return frozenset(names)


@functools.cache
def _instructions(code: CodeType) -> list[dis.Instruction]:
    return [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "PRECALL", "EXTENDED_ARG", "NOP")]
