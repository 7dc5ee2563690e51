"""Data of the experiments: real, and read from folders or from what installed packages bring; nothing is downloaded."""

import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

Batches = Iterator[tuple[Tensor, Tensor]]
WORKERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Data:
    """Training batches that depend on (seed, epoch) alone, and test batches."""

    train: Callable[[int, int], Batches]  # (seed, epoch)
    test: Callable[[], Batches]
    steps: int  # per epoch


def digit_images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training and test images (n, 1, 8, 8) and labels (n,) of scikit-learn's 1797 digits, 30% of them for the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16.0, labels, test_size=0.3, random_state=0, stratify=labels)
    train_x, test_x = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) for x in parts[:2])
    train_y, test_y = (torch.tensor(y) for y in parts[2:])
    return train_x, train_y, test_x, test_y


def digits(root: Path | None = None, quick: bool = False, validation: bool = False, size: int = 8) -> Data:
    """Return scikit-learn's digits in batches of 64; for validation, the last tenth of the training images is the test.

    Above their own 8 pixels a side they are enlarged, and have three channels, as networks for photographs take them.
    """
    train_x, train_y, test_x, test_y = digit_images()
    if size > 8:
        train_x, test_x = (F.interpolate(x, (size, size), mode="bilinear").expand(-1, 3, -1, -1) for x in (train_x, test_x))
    if validation:
        split = len(train_x) * 9 // 10
        train_x, train_y, test_x, test_y = train_x[:split], train_y[:split], train_x[split:], train_y[split:]

    def train(seed: int, epoch: int) -> Batches:
        order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for index in order.split(64):
            yield train_x[index], train_y[index]

    return Data(train, lambda: iter([(test_x, test_y)]), -(-len(train_x) // 64))


def characters(
    root: Path | None = None,
    quick: bool = False,
    validation: bool = False,
    batch: int = 32,
    length: int = 512,
    steps: int = 1000,
) -> Data:
    """Return windows of a text as bytes, the last tenth for the test.

    Args:
        root: a text file; by default the sources of Python's own standard library.
        quick: use little of it.
        validation: leave the test out, and test on the last tenth of the rest.
        batch: windows per step.
        length: characters per window.
        steps: per epoch.
    """
    text = torch.from_numpy(_bytes_of(root)[: 200_000 if quick else None]).long()
    text = text[: len(text) * 9 // 10] if validation else text
    split = len(text) * 9 // 10
    if split < 10 * (length + 1):
        raise SystemExit(f"{root} has {len(text)} characters; a text of {20 * (length + 1)} at least is needed.")

    def windows(part: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        rows = part[starts[:, None] + torch.arange(length + 1)]  # (batch, length + 1)
        return rows[:, :-1], rows[:, 1:]

    def train(seed: int, epoch: int) -> Batches:
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        for _ in range(steps):
            yield windows(text[:split], torch.randint(split - length - 1, (batch,), generator=generator))

    def test() -> Batches:
        starts = torch.arange(0, len(text) - split - length - 1, length)
        starts = starts[:: max(1, len(starts) // (4 * batch))]  # some hundred windows, evenly spaced
        for index in starts.split(batch):
            yield windows(text[split:], index)

    steps = 20 if quick else steps
    return Data(train, test, steps)


def _bytes_of(path: Path | None) -> np.ndarray:
    """Read a text, or the modules of the standard library in alphabetical order."""
    if path is not None and not path.is_file():
        raise SystemExit(f"There is no text file {path}. Name one with --data, or leave --data out for Python's own sources.")
    files = [path] if path else sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return np.frombuffer(b"\n".join(file.read_bytes() for file in files), dtype=np.uint8).copy()


def cifar10(root: Path | None = None, quick: bool = False, validation: bool = False) -> Data:
    """Return CIFAR-10 with the usual crops and flips; the last tenth of the training images is for validation only."""
    return _cifar(datasets.CIFAR10, "cifar-10-batches-py", root, quick, validation)


def cifar100(root: Path | None = None, quick: bool = False, validation: bool = False) -> Data:
    """Return CIFAR-100, as `cifar10`."""
    return _cifar(datasets.CIFAR100, "cifar-100-python", root, quick, validation)


def _cifar(dataset: Any, folder: str, root: Path | None, quick: bool, validation: bool) -> Data:
    normalize = [transforms.ToTensor(), transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))]
    crop = [transforms.RandomCrop(32, padding=4, padding_mode="reflect"), transforms.RandomHorizontalFlip()]
    try:
        train = dataset(_existing(root, folder), train=True, transform=transforms.Compose(crop + normalize))
        test = dataset(root, train=validation, transform=transforms.Compose(normalize))
    except RuntimeError as error:
        raise SystemExit(_layout(root, folder, "the extracted archive of its website, complete and unchanged")) from error
    split = len(train) * 9 // 10
    test = Subset(test, range(split, len(test))) if validation else test
    return _loaded(Subset(train, range(split)), test, 128, quick)


def imagenet(root: Path | None = None, quick: bool = False, validation: bool = False) -> Data:
    """Return an ImageNet folder: train/<class>/*.JPEG and val/<class>/*.JPEG, with the usual 224 pixel crops.

    Its test images are what is usually validated on, so `validation` changes nothing.
    """
    normalize = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    crop = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    parts = []
    for part, changes in (("train", crop), ("val", [transforms.Resize(256), transforms.CenterCrop(224)])):
        try:
            parts.append(datasets.ImageFolder(_existing(root, part) / part, transforms.Compose(changes + normalize)))
        except (FileNotFoundError, RuntimeError) as error:
            raise SystemExit(_layout(root, part, "one folder per class with its images")) from error
    if parts[0].classes != parts[1].classes:
        raise SystemExit(f"{root}: train/ and val/ have different classes; the folders' names must be the same.")
    return _loaded(*parts, 256, quick)


def _existing(root: Path | None, folder: str) -> Path:
    if root is None or not (root / folder).is_dir():
        raise SystemExit(_layout(root, folder, "the data"))
    return root


def _layout(root: Path | None, folder: str, content: str) -> str:
    where = root or "FOLDER"
    return f"The data set is missing or incomplete. Name its folder with --data; {where}/{folder}/ must hold {content}."


def _loaded(train: Any, test: Any, batch: int, quick: bool) -> Data:
    if quick:
        train, test = (Subset(d, range(min(len(d), 2 * batch))) for d in (train, test))

    def batches(seed: int, epoch: int) -> Batches:
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        torch.manual_seed(1000 * seed + epoch)  # of the augmentation, in this process
        workers = 0 if quick else WORKERS
        yield from DataLoader(train, batch, shuffle=True, generator=generator, num_workers=workers)

    steps = -(-len(train) // batch)
    return Data(batches, lambda: iter(DataLoader(test, batch, num_workers=0 if quick else WORKERS)), steps)
