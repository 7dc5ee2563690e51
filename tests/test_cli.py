"""The command line, run as people run it, and the one-way import rule."""

import ast
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sparsify.cli import main
from sparsify.cli.show import stages

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
    assert main(["compare", "resnet18", "--density", "0.2,0.1", "--distribution", "uniform,erk", "--json", str(file)]) == 0
    shown, saved = capsys.readouterr().out, json.loads(file.read_text())
    assert [(r["target"], r["distribution"]) for r in saved] == [(d, n) for d in (0.2, 0.1) for n in ("uniform", "erk")]
    lines = [line.split() for line in shown.splitlines()]
    for report in saved:
        row = next(x for x in lines if x[:2] == [f"{report['target']:g}", report["distribution"]])
        assert row[3] == f"{report['inference_ratio']:.4f}"
    assert ["fc.weight", "0.2000", "0.7197"] in lines


def test_tables_fit_the_window_and_colour_what_is_masked(tmp_path: Path) -> None:
    main_, window = pty.openpty()
    command = [sys.executable, "-W", "ignore", "-m", "sparsify", "resnet18", "--density", "0.1", "--no-verify"]
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"COLUMNS": "72", "TERM": "xterm"}
    with subprocess.Popen(command, stdout=window, stderr=subprocess.PIPE, env=environment):
        os.close(window)
        read = b""
        while part := _read(main_):
            read += part
    shown = read.decode()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    table = plain.replace("\r", "").split("\n\n")[0].splitlines()
    assert plain != shown
    assert max(map(len, table)) <= 72
    assert any(line.startswith("layer4.0.downsample.0") or "…" in line for line in table)
    assert table[-1].startswith("total")


def test_stages_are_one_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for lines in (False, True):
        say = stages(lines=lines)
        say("counting")
        say("")
        assert capsys.readouterr().err == "counting\n" * lines
    terminal, window = pty.openpty()
    with open(window, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        say = stages(lines=False)
        say("counting")
        say("")
        shown = os.read(terminal, 200)
    assert shown == b"counting".ljust(30) + b"\r" + b" " * 30 + b"\r"


def _read(window: int) -> bytes:
    try:
        return os.read(window, 65536)
    except OSError:  # as Linux ends it
        return b""


def test_models_of_other_libraries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    assert main([f"hf:{tmp_path}", "--density", "0.1", "--input", "2x16"]) == 0
    assert "BertModel on 2x16" in capsys.readouterr().out
    assert main(["timm:convnext_atto", "--density", "0.1", "--no-verify"]) == 0
    assert "head.fc.weight" in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("resnet50", "compare", "--html", "rigl-sg"))
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


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
    "two distributions": (["resnet18", "--density", "0.1", "--distribution", "er,erk"], "Unknown distribution 'er,erk'"),
    "speed of nothing": (["resnet18", "--density", "0.1", "--speed"], "for the page that --html writes"),
    "unknown timm": (["timm:convnext_atom", "--density", "0.1"], "Did you mean convnext_atto"),
    "no configuration": (["hf:nowhere", "--density", "0.1"], "no configuration on this machine"),
    "density of a comparison": (["compare", "resnet18", "--density", "0.1,3"], "must be a number in (0, 1]"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_failures(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["resnet18"],
        ["resnet18", "--density", "0.1", "--input", "3xx"],
        ["compare", "resnet18", "--density", "few"],
        ["completion", "fish"],
    ],
)
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
