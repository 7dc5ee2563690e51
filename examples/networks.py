"""Networks of the experiments: those of the RigL paper and of its reproduction, and a small one for 8x8 digits."""

import torch
from torch import Tensor, nn
from torchvision.models import resnet50


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(x).relu()
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return shortcut + self.conv2(self.bn2(self.conv1(out)).relu())


class WideResNet22(nn.Module):
    """WRN-22-2 of the RigL paper and its reproduction: widths 16/32/64/128, 3 blocks a stage, for 32x32 images."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        widths = ((16, 32, 1), (32, 64, 2), (64, 128, 2))
        self.blocks = nn.Sequential(
            *(_BasicBlock(i if b == 0 else o, o, s if b == 0 else 1) for i, o, s in widths for b in range(3))
        )
        self.bn, self.fc = nn.BatchNorm2d(128), nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.blocks(self.conv(x))).relu().mean((2, 3)))


def cifar_resnet50(classes: int = 100) -> nn.Module:
    """Return ResNet-50 for 32x32 images: a 3x3 stem of stride 1 and no pooling, as in the reproduction."""
    model = resnet50(num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    return model


class CharGRU(nn.Module):
    """A character-level language model: embedding, GRU, two readout layers (RigL paper, section 4.2 and appendix I).

    The paper's sizes are the defaults; the classes are bytes.
    """

    def __init__(self, hidden: int = 512, embedding: int = 128, classes: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, embedding)
        self.gru = nn.GRU(embedding, hidden, batch_first=True)
        self.readout1 = nn.Linear(hidden, hidden // 2)
        self.readout2 = nn.Linear(hidden // 2, hidden // 4)
        self.head = nn.Linear(hidden // 4, classes)

    def forward(self, x: Tensor) -> Tensor:  # (batch, characters) -> (batch, classes, characters), as cross_entropy takes it
        hidden = torch.relu(self.readout2(torch.relu(self.readout1(self.gru(self.embedding(x))[0]))))
        return self.head(hidden).transpose(1, 2)


def digit_net() -> nn.Module:
    """Return a convolutional network for 8x8 images: 93k weights."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 16, 72),
        nn.ReLU(),
        nn.Linear(72, 10),
    )
