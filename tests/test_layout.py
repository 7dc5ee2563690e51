"""The rooms of the house: what each may import, and how long a file may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for package in ("passes", "sparsify") for path in (ROOT / package).rglob("*.py"))

# {room: the rooms that it may import}, from left to right. A file that is alone in its room has its own name.
_PASSES = {
    "torch_ops": "",
    "shards": "",
    "capture": "torch_ops shards",
    "kernels": "torch_ops shards",
    "weights": "torch_ops shards capture kernels",
    "masking": "torch_ops shards capture kernels weights",
    "counting": "torch_ops shards capture kernels weights masking",
    "channels": "torch_ops shards capture kernels weights masking counting",
    "lowering": "torch_ops shards capture kernels weights masking counting channels",
}
_SPARSIFY = {
    "checks": "",
    "density": "checks",
    "methods": "checks density",
    "training": "checks density methods",
    "saving": "checks density methods training",
    "integrations": "checks density methods training saving",
    "costs": "checks density methods training saving",
    "api": "checks density methods training saving integrations costs",
    "cli": "checks density methods training saving integrations costs api",
    "__main__": "cli",
}
_ROOMS = {f"passes.{room}": {f"passes.{r}" for r in left.split()} for room, left in _PASSES.items()}
_ROOMS |= {
    f"sparsify.{room}": {f"sparsify.{r}" for r in left.split()} | {f"passes.{r}" for r in _PASSES}
    for room, left in _SPARSIFY.items()
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(name: str) -> str:
    return ".".join(name.split(".")[:2])


MODULES = {name_of(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """Every module of ours that a file imports anywhere, inside functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.partition(".")[0] in ("passes", "sparsify")}


@pytest.mark.parametrize("name", MODULES)
def test_arrows_run_one_way(name: str) -> None:
    if name in ("passes", "sparsify"):  # the doors, which show what is inside
        assert name == "sparsify" or not any(i.startswith("sparsify") for i in imports(MODULES[name]))
        return
    room = room_of(name)
    foreign = {room_of(other) for other in imports(MODULES[name])} - {room}
    assert foreign <= _ROOMS[room], f"{name} must not import {', '.join(sorted(foreign - _ROOMS[room]))}"


def test_no_circle() -> None:
    """A file can be imported once all that it imports are; whatever is left over goes round."""
    left = {name: imports(path) - {name} for name, path in MODULES.items() if name not in ("passes", "sparsify")}
    while ready := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in ready:
            del left[name]
    assert not left, f"these import each other: {sorted(left)}"


@pytest.mark.parametrize("name", MODULES)
def test_files_are_short(name: str) -> None:
    assert len(MODULES[name].read_text().splitlines()) <= 250
