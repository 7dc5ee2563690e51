"""Build the wheel, install it outside the checkout and use it there, as a new user would: the last step of the gate.

With `--torch VERSION` it goes into an environment of its own, with that torch and what else it depends on (`make oldest`).
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
USE = """
import sys
import torch
from torch import nn
import passes, sparsify

assert all(not module.__file__.startswith({root!r}) for module in (passes, sparsify)), sparsify.__file__
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))
model = sparsify.sparsify(model, density=0.25, method=sparsify.RigL(interval=10))
report = sparsify.flop_report(model, (1, 16))
report.to_html("report.html")
assert (report.dense_macs, report.sparse_macs) == (1088, sum(model.updater.nonzeros.values())), report
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
model.updater.attach(optimizer, total_steps=100)
x = torch.randn(256, 16)
y, before, losses = x[:, :1] - x[:, 1:2], model.updater.masks["0.weight"].clone(), []
for _ in range(100):
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0] / 10, losses
assert not torch.equal(before, model.updater.masks["0.weight"])
fast = sparsify.lower(model.eval(), x)
torch.testing.assert_close(fast(x), model(x))
print(f"wheel: {{sparsify.__file__}} trains from {{losses[0]:.3f}} to {{losses[-1]:.3f}}")
"""


def main(version: str | None) -> None:
    """Fail loudly unless the wheel works on its own."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", folder, str(ROOT)], check=True, stdout=-3)
        (wheel,) = Path(folder).glob("sparsify_fx-*.whl")
        subprocess.run([sys.executable, "-m", "twine", "check", "--strict", str(wheel)], check=True, stdout=-3)
        target = Path(folder) / "site"
        python, there = _environment(target, wheel, version) if version else _folder(target, wheel)
        options = {"check": True, "cwd": folder, "env": {**os.environ, **there}}
        subprocess.run([*python, "-c", USE.format(root=str(ROOT))], **options)
        command = [str(target / "bin" / "sparsify"), "resnet18", "--density", "0.1", "--no-verify"]
        printed = subprocess.run([*python, *command], **options, capture_output=True, text=True).stdout
        assert "coverage:  21 masked" in printed, printed


def _folder(target: Path, wheel: Path) -> tuple[list[str], dict[str, str]]:
    """Install the wheel alone into a folder; torch and the rest come from the environment that runs this."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True)
    return [sys.executable], {"PYTHONPATH": str(target)}


def _environment(target: Path, wheel: Path, version: str) -> tuple[list[str], dict[str, str]]:
    """Install the wheel and what it depends on into an empty environment."""
    subprocess.run([sys.executable, "-m", "venv", str(target)], check=True)
    python = str(target / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"torch=={version}", str(wheel)], check=True)
    return [python, "-W", "ignore"], {}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch")
    main(parser.parse_args().torch)
