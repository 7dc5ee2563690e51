"""Sparse training in an Accelerate loop: attach the plain optimizer, then prepare as usual.

accelerate launch examples/accelerate_digits.py       # or plain python; on CPUs, GPUs, with --mixed_precision bf16, ...
"""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from data import digit_images
from networks import digit_net
from torch.utils.data import DataLoader, TensorDataset

from sparsify import RigL, sparsify


def main() -> None:
    """Train, and print the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    accelerator = Accelerator(gradient_accumulation_steps=2)
    torch.manual_seed(0)
    train_x, train_y, test_x, test_y = digit_images()
    model = sparsify(digit_net(), density=0.1, method=RigL(interval=10), init="fan_in")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(TensorDataset(train_x, train_y), batch_size=32, shuffle=True)
    updater = model.updater
    model, prepared, loader = accelerator.prepare(model, optimizer, loader)
    updater.attach(optimizer, total_steps=options.epochs * -(-len(loader) // accelerator.gradient_accumulation_steps))
    for _ in range(options.epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                prepared.step()
                prepared.zero_grad()
    with torch.no_grad():
        test_x, test_y = test_x.to(accelerator.device), test_y.to(accelerator.device)
        accuracy = (model.eval()(test_x).argmax(1) == test_y).float().mean().item()
    density = updater.scalars()["sparsity/density"]
    accelerator.print(f"accuracy {100 * accuracy:.2f}%, density {density:.3f}, step {updater.step} of {updater.total_steps}")


if __name__ == "__main__":
    main()
