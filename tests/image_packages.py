"""Stand-ins for torchvision and timm, as far as a page needs them: their wheels may not load beside torch for CPUs."""

import sys
from types import ModuleType

import numpy as np
import torch
import torchmetrics  # noqa: F401  it looks for torchvision when it is first imported
from PIL import Image
from torch import nn
from torch.utils.data import Dataset


class ImageFolder(Dataset):
    """Images in a folder a class."""

    def __init__(self, root, transform):
        from pathlib import Path

        self.classes = sorted(path.name for path in Path(root).iterdir())
        self.files = [
            (path, label) for label, name in enumerate(self.classes) for path in sorted((Path(root) / name).iterdir())
        ]
        self.transform = transform

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        path, label = self.files[index]
        return self.transform(Image.open(path).convert("RGB")), label


def _resize(size):
    return lambda image: nn.functional.interpolate(image[None].float(), size)[0]


def _compose(steps):
    def apply(image):
        for step in steps:
            image = step(image)
        return image

    return apply


def _create_model(name, num_classes):
    norm = [nn.BatchNorm2d(4)] if "resnet" in name else []
    return nn.Sequential(nn.Conv2d(3, 4, 3), *norm, nn.ReLU(), nn.Flatten(), nn.LazyLinear(num_classes))


def install(monkeypatch):
    """Put the stand-ins where the packages would be."""
    v2 = ModuleType("torchvision.transforms.v2")
    v2.Compose, v2.Resize = _compose, _resize
    v2.ToImage = lambda: lambda image: torch.from_numpy(np.array(image)).movedim(-1, 0)
    v2.ToDtype = lambda dtype, scale: lambda image: image.to(dtype) / 255
    modules = {
        name: ModuleType(name) for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "timm")
    }
    modules["torchvision.datasets"].ImageFolder = ImageFolder
    modules["torchvision.transforms"].v2 = v2
    modules["timm"].create_model = _create_model
    for name, module in {**modules, "torchvision.transforms.v2": v2}.items():
        monkeypatch.setitem(sys.modules, name, module)
