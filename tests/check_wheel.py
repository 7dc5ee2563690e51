"""Build the wheel, install it outside the checkout and use it there, as a new user would: the last step of the gate."""

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
print(f"wheel: {{sparsify.__file__}} trains from {{losses[0]:.3f}} to {{losses[-1]:.3f}}")
"""


def main() -> None:
    """Fail loudly unless the wheel works on its own."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", folder, str(ROOT)], check=True, stdout=-3)
        (wheel,) = Path(folder).glob("sparsify_fx-*.whl")
        subprocess.run([sys.executable, "-m", "twine", "check", "--strict", str(wheel)], check=True, stdout=-3)
        # The wheel goes into a folder of its own; torch and the rest come from the environment that runs this.
        target = Path(folder) / "site"
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
        subprocess.run(install, check=True)
        there = {"check": True, "cwd": folder, "env": {**os.environ, "PYTHONPATH": str(target)}}
        subprocess.run([sys.executable, "-c", USE.format(root=str(ROOT))], **there)
        command = [str(target / "bin" / "sparsify"), "resnet18", "--density", "0.1", "--no-verify"]
        printed = subprocess.run([sys.executable, *command], **there, capture_output=True, text=True).stdout
        assert "coverage:  21 masked" in printed, printed


if __name__ == "__main__":
    main()
