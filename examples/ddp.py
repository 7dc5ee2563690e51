"""Sparse training on several processes with DistributedDataParallel: CPUs (gloo) or GPUs (NCCL), unchanged.

torchrun --nproc-per-node 2 examples/ddp.py                        # two CPU processes, or two GPUs where there are as many
torchrun --nproc-per-node 2 examples/ddp.py --checkpoint run.pt    # goes on where it was stopped, on any number of ranks
"""

import argparse
import os
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from data import digit_images
from networks import digit_net
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparsify import RigL, load_checkpoint, save_checkpoint, sparsify

BATCH = 64  # of all ranks together, so that the schedule does not depend on their number


def main() -> None:
    """Train on the rank that torchrun started."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--checkpoint", type=Path, help="written after every epoch, and gone on from")
    options = parser.parse_args()
    gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same model on every rank; its masks come from sparsify's own seed
    model = sparsify(digit_net(), options.density, method=RigL(interval=20), init="fan_in").to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    train_x, train_y, test_x, test_y = (t.to(device) for t in digit_images())
    steps = len(train_x) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * steps)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    saved = load_checkpoint(options.checkpoint, **parts) if options.checkpoint else None
    model.updater.attach(optimizer, total_steps=options.epochs * steps)
    ddp = DistributedDataParallel(model, device_ids=[device] if gpus else None)

    for epoch in range(saved["epoch"] if saved else 0, options.epochs):
        order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(epoch))
        for batch in order[: steps * BATCH].split(BATCH):
            own = batch[rank::ranks].to(device)
            optimizer.zero_grad()
            F.cross_entropy(ddp(train_x[own]), train_y[own]).backward()
            optimizer.step()
            schedule.step()
        if rank == 0 and options.checkpoint:
            save_checkpoint(options.checkpoint, **parts, epoch=epoch + 1)
        dist.barrier()

    accuracy = test(model, test_x, test_y)
    mask_bits = b"".join(mask.cpu().numpy().tobytes() for mask in model.updater.masks.values())
    line = f"rank {rank} of {ranks}: accuracy {accuracy:.2f}%, masks {zlib.crc32(mask_bits):08x}, step {model.updater.step}"
    lines = [""] * ranks
    dist.all_gather_object(lines, line)
    if rank == 0:  # one process prints: lines that several write at once run into each other
        print(*lines, sep="\n")
    dist.destroy_process_group()


@torch.no_grad()
def test(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the accuracy in percent."""
    return 100 * (model.eval()(x).argmax(1) == y).float().mean().item()


if __name__ == "__main__":
    main()
