"""README and docs: every block of Python and every command in them runs."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torchvision
from torch import distributed, nn
from torch.utils.data import DataLoader, TensorDataset

import sparsify as package
from sparsify import cli, flop_report, sparsify

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if p.name != "reference.md")]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SAMPLES = TensorDataset(torch.randn(4, 3, 32, 32), torch.randint(10, (4,)))


class Net(nn.Module):
    """What the pages call `net`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU())
        self.fc = nn.Linear(1568, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layers(x).flatten(1))


class Module(lightning.LightningModule):
    """What the pages call `module`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Take one step."""
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()


def names() -> dict[str, Any]:
    """What the pages take for given."""
    pruned = Net()
    with torch.no_grad():
        for weight in (p for p in pruned.parameters() if p.dim() > 1):
            weight[weight.abs() < weight.abs().median()] = 0
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return {
        "torch": torch,
        "sparsify": sparsify,
        "flop_report": flop_report,
        "loader": DataLoader(SAMPLES, batch_size=2),
        "epochs": 100,
        "loss_fn": nn.functional.cross_entropy,
        "net": Net(),
        "initial": Net(),
        "trained": Net(),
        "pruned": pruned,
        "module": Module(),
        "options": {"accelerator": "cpu", "limit_train_batches": 1, **quiet},
        "train": train,
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in, with a model of one's own, and a group of one process."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_package.py").write_text("from test_docs import Net\nmake_net = Net\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield tmp_path
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # lightning's own
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_everything_on_a_page_runs(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A block of text after one of code is what that prints."""
    known, printed = names(), ""
    blocks = BLOCK.findall(page.read_text())
    assert blocks
    for language, code in blocks:
        if language == "python":
            capsys.readouterr()
            exec(compile(code, page.name, "exec"), known)
            printed = capsys.readouterr().out
        if language == "text":
            assert printed == code
        for command in code.splitlines() if language == "console" else ():
            program, *arguments = shlex.split(command)
            assert program == "sparsify"
            assert cli.main(arguments) == 0, command


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_is_short_and_its_report_is_real() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 170
    with torch.device("meta"):
        model = sparsify(torchvision.models.resnet50(), density=0.1)
    printed = str(flop_report(model, (1, 3, 224, 224))).splitlines()
    (report,) = [code for _, code in BLOCK.findall(text) if code.startswith("layer ")]
    for line in report.splitlines():
        assert line == "..." or line in printed, line


def test_the_reference_names_everything() -> None:
    """Every name that `sparsify` exports has its entry, and the site builds without a warning."""
    text = (ROOT / "docs" / "reference.md").read_text()
    entries = {name.rpartition(".")[2] for name in re.findall(r"\.\. auto\w+:: (\S+)", text)}
    assert set(package.__all__) <= entries


@pytest.mark.sweep  # the better part of a minute
def test_the_site_builds_strictly() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "build_site.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "flop_report" in (ROOT / "build" / "site" / "docs" / "reference.html").read_text()
