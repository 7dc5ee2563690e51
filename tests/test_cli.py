"""The command line, run as people run it, and the one-way import rule."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sparsify.cli import main

ROOT = Path(__file__).parents[1]


def test_a_report_with_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(tmp_path / name) for name in ("graph.svg", "report.json", "layers.png")]
    options = ["--input", "1x3x64x64", "--graph", files[0], "--json", files[1], "--plot", files[2]]
    assert main(["resnet18", "--density", "0.1", *options]) == 0
    assert "inference:" in capsys.readouterr().out
    assert "<svg" in Path(files[0]).read_text()
    assert json.loads(Path(files[1]).read_text())["method"] == "rigl"
    assert Path(files[2]).stat().st_size > 1000


def test_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "reports.json"
    assert main(["resnet18", "--flops", "0.3", "--distribution", "uniform,er,erk", "--json", str(file)]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("inference FLOPs / dense"))
    assert line.split()[-3:] == ["0.3000"] * 3
    assert list(json.loads(file.read_text())) == ["uniform", "er", "erk"]


def test_coverage_of_every_weight(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--exclude", "head.*", "--include", "*.norm1.weight"]
    assert main(["swin_t", "--density", "0.2", "--coverage", *options]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[2:])
    assert rows["features.1.0.attn.qkv.weight"] == rows["features.1.0.norm1.weight"] == "masked"
    assert rows["head.weight"] == "dense: excluded by 'head.*'"


def test_a_users_own_model_and_the_graph(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from torch import nn\ndef make(): return nn.Sequential(nn.Linear(4, 8))\n")
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "sparsify",
        "mine:make",
        "--density",
        "0.5",
        "--input",
        "1x4",
        "--graph",
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "* masked_0" in result.stdout


BAD = {
    "unknown model": (["resnet5", "--density", "0.1"], "Did you mean resnet50"),
    "bad density": (["resnet18", "--density", "3"], "must be a number in (0, 1]"),
    "unknown distribution": (["resnet18", "--density", "0.1", "--distribution", "erkk"], "Did you mean 'erk'"),
    "no factory": (["nowhere:make", "--density", "0.1"], "Cannot load nowhere:make"),
    "a file": (["nets.py:make", "--density", "0.1"], "Write nets:make."),
    "a factory with arguments": (
        ["math:sqrt", "--density", "0.1"],
        "Cannot load math:sqrt, which is called without arguments",
    ),
    "no colon": (["my_package.make", "--density", "0.1"], "Name your own as package.module:factory"),
    "no folder": (["resnet18", "--density", "0.1", "--json", "nowhere/x.json"], "there is no folder nowhere"),
    "not a module": (["math:ulp", "--density", "0.1"], "ulp"),
    "wrong input": (["resnet18", "--density", "0.1", "--input", "1x4x8x8"], "module 'conv1'"),
    "two graphs": (["resnet18", "--density", "0.1", "--distribution", "er,erk", "--graph"], "name one"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_failures(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out


@pytest.mark.parametrize("arguments", [[], ["resnet18"], ["resnet18", "--density", "0.1", "--input", "3xx"]])
def test_usage_errors(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2


def test_passes_never_import_sparsify() -> None:
    for path in (ROOT / "passes").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "sparsify" for name in names), path
