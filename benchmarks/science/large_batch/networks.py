"""The networks of Hoffer, Hubara, Soudry 2017, and the steps of their learning rates, as the authors published them."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_gap.demo.f1 import F1

__all__ = ["C1", "F1", "Phases", "ResNet44"]


class C1(nn.Sequential):
    """Two convolutions of 64 channels and three fully connected layers, for images of 32 × 32.

    Args:
        classes: How many there are.
    """

    def __init__(self, classes: int = 10) -> None:
        layers: list[nn.Module] = []
        for channels in (3, 64):
            layers += [
                nn.Conv2d(channels, 64, kernel_size=5, padding=2, bias=False),
                nn.MaxPool2d(kernel_size=3, stride=2),
                nn.BatchNorm2d(64),
                nn.ReLU(inplace=True),
            ]
        layers.append(nn.Flatten())
        for inputs, outputs in ((64 * 7 * 7, 384), (384, 192)):
            layers += [
                nn.Linear(inputs, outputs, bias=False),
                nn.BatchNorm1d(outputs),
                nn.ReLU(inplace=True),
                nn.Dropout(0.5),
            ]
        super().__init__(*layers, nn.Linear(192, classes))


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        changes = stride != 1 or inputs != outputs
        self.around = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if changes
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of images (n, c, h, w)."""
        return nn.functional.relu(self.body(x) + self.around(x))


class ResNet44(nn.Sequential):
    """He et al.'s residual network of 44 layers for images of 32 × 32, with convolutions on its short cuts.

    Args:
        classes: How many there are.
    """

    def __init__(self, classes: int = 10) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
        ]
        before = 16
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            for step in range(7):
                layers.append(Block(before, width, stride if step == 0 else 1))
                before = width
        super().__init__(*layers, nn.AvgPool2d(8), nn.Flatten(), nn.Linear(64, classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class Phases(LambdaLR):
    """A learning rate that is multiplied by given factors from given epochs on, up or down.

    Args:
        optimizer: Whose learning rates.
        factors: For each first epoch of a phase, its rate as a multiple of the optimizer's.
    """

    def __init__(self, optimizer: Optimizer, factors: Mapping[int, float]) -> None:
        super().__init__(optimizer, partial(_factor, dict(factors)))


def _factor(factors: Mapping[int, float], epoch: int) -> float:
    begun = [first for first in factors if first <= epoch]
    return factors[max(begun)] if begun else 1.0
