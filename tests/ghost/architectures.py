"""Ten architectures that use batch normalization, small but with the parts that make each of them what it is."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv(i: int, o: int, k: int = 3, **options: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(i, o, k, padding=k // 2, bias=False, **options), nn.BatchNorm2d(o), nn.ReLU(inplace=True)
    )


class Bottleneck(nn.Module):
    """Of ResNet-50: 1x1, 3x3, 1x1, and a projection where the shape changes."""

    def __init__(self, i: int, width: int, stride: int = 1) -> None:
        super().__init__()
        o = 4 * width
        self.body = nn.Sequential(
            conv(i, width, 1),
            conv(width, width, 3, stride=stride),
            nn.Conv2d(width, o, 1, bias=False),
            nn.BatchNorm2d(o),
        )
        self.skip = (
            nn.Sequential(nn.Conv2d(i, o, 1, stride=stride, bias=False), nn.BatchNorm2d(o))
            if i != o or stride > 1
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


def resnet50(width: int = 64, blocks: tuple[int, ...] = (3, 4, 6, 3)) -> nn.Module:
    """ResNet-50 at its own width and depth: 53 BatchNorm layers, 25.6 million weights with 1000 classes."""
    layers: list[nn.Module] = [conv(3, width, 7, stride=2), nn.MaxPool2d(3, 2, 1)]
    i = width
    for stage, count in enumerate(blocks):
        w = width * 2**stage
        for block in range(count):
            layers.append(Bottleneck(i, w, 2 if stage and not block else 1))
            i = 4 * w
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(i, 1000))


class InvertedResidual(nn.Module):
    """Of MobileNetV2, with the squeeze-excitation of EfficientNet where asked."""

    def __init__(self, i: int, o: int, stride: int, act: type[nn.Module], squeeze: bool) -> None:
        super().__init__()
        wide = 4 * i
        self.expand = nn.Sequential(nn.Conv2d(i, wide, 1, bias=False), nn.BatchNorm2d(wide), act())
        self.depthwise = nn.Sequential(
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide, eps=1e-3), act()
        )
        self.gate = (
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, i, 1), act(), nn.Conv2d(i, wide, 1), nn.Sigmoid())
            if squeeze
            else None
        )
        self.project = nn.Sequential(nn.Conv2d(wide, o, 1, bias=False), nn.BatchNorm2d(o, momentum=0.01))
        self.residual = stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        if self.gate is not None:
            y = y * self.gate(y)
        y = self.project(y)
        return x + y if self.residual else y


def mobile(act: type[nn.Module], squeeze: bool) -> nn.Module:
    return nn.Sequential(
        conv(3, 8, stride=2), InvertedResidual(8, 8, 1, act, squeeze), InvertedResidual(8, 12, 2, act, squeeze),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip


class DenseNet(nn.Module):
    """Normalization before activation, on ever wider concatenations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8 + 4 * i), nn.ReLU(), nn.Conv2d(8 + 4 * i, 4, 3, padding=1, bias=False))
            for i in range(3)
        )
        self.norm, self.head = nn.BatchNorm2d(20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat((x, layer(x)), 1)
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


def vgg() -> nn.Module:
    return nn.Sequential(
        conv(3, 8), conv(8, 8), nn.MaxPool2d(2), conv(8, 16), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(16 * 16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 5),
    )  # fmt: skip


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.bottom, self.up = conv(3, 4), conv(4, 8), nn.ConvTranspose2d(8, 4, 2, 2)
        self.merge, self.head = conv(8, 4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        return self.head(self.merge(torch.cat((skip, self.up(self.bottom(F.max_pool2d(skip, 2)))), 1)))


class PointNet(nn.Module):
    """Points as (N, C, L), then a global feature as (N, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Sequential(
            nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 16, 1), nn.BatchNorm1d(16)
        )
        self.head = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.points(x).amax(2))


def volumes() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(4, 8, 3),
        nn.BatchNorm3d(8), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


class TabNet(nn.Module):
    """Gated linear units over normalized features, one weight shared by two steps, each with its own norm."""

    def __init__(self) -> None:
        super().__init__()
        self.initial, self.shared = nn.BatchNorm1d(10, momentum=0.01), nn.Linear(10, 16, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm1d(16, momentum=0.02) for _ in range(2))
        self.mask, self.mask_norm = nn.Linear(8, 10, bias=False), nn.BatchNorm1d(10)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.initial(x)
        first = F.glu(self.norms[0](self.shared(x)))
        chosen = x * self.mask_norm(self.mask(first)).softmax(1)
        return self.head(first + F.glu(self.norms[1](self.shared(chosen))) * 0.5**0.5)


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8, stride=2)
        self.branches = nn.ModuleList(
            [conv(8, 4, 1), nn.Sequential(conv(8, 4, 1), conv(4, 6)), nn.Sequential(conv(8, 2, 1), conv(2, 4, 5)),
             nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(8, 2, 1))]
        )  # fmt: skip
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.cat([branch(x) for branch in self.branches], 1).mean((2, 3)))


IMAGE, TALL = (3, 16, 16), (3, 32, 32)
ARCHITECTURES = {
    "ResNet": (lambda: resnet50(4, (1, 1, 2, 1)), TALL, 20),
    "MobileNetV2": (lambda: mobile(nn.ReLU6, False), IMAGE, 7),
    "EfficientNet": (lambda: mobile(nn.SiLU, True), IMAGE, 7),
    "DenseNet": (DenseNet, IMAGE, 4),
    "VGG-bn": (vgg, IMAGE, 4),
    "U-Net": (UNet, IMAGE, 3),
    "PointNet": (PointNet, (3, 20), 3),
    "3-D convolutions": (volumes, (1, 6, 6, 6), 2),
    "TabNet": (TabNet, (10,), 4),
    "Inception": (Inception, IMAGE, 7),
}
