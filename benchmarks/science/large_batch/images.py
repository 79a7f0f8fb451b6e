"""Images with the authors' augmentation: padded, cropped at random and mirrored, each epoch in a new order."""

import gzip
import io
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

__all__ = ["Images"]

Arrays = tuple[NDArray[np.uint8], NDArray[np.uint8]]
_IDX = {"train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")}
_IDX["test"] = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")


class Images(LightningDataModule):
    """Images of a file, or of the folder of MNIST's four ``.gz`` files.

    Args:
        path: An ``.npz`` with ``train_images`` (n, h, w) or (n, h, w, 3) of bytes, ``train_labels``, ``test_images``
            and ``test_labels``; or with ``train_jpeg``, the bytes of JPEGs one after the other, and ``train_offsets``;
            or a folder with ``train-images-idx3-ubyte.gz`` and its three companions.
        batch_size: Images in a batch.
        padding: How far an image may be moved in training.
        fill: The byte outside an image that has moved.
        mean: Subtracted from each channel, of bytes as numbers from 0 to 1.
        std: By which each channel is divided.
        seed: Of the order and of the augmentation. An epoch's are named by seed and epoch, so a resumed run goes on
            with those of an uninterrupted one.
        held_out: The share of the training images that is validated on in the place of the test images, to choose by.
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 128,
        padding: int = 2,
        fill: int = 0,
        mean: tuple[float, ...] = (0.5,),
        std: tuple[float, ...] = (0.5,),
        seed: int = 0,
        held_out: float = 0.0,
    ) -> None:
        super().__init__()
        self.path, self.batch_size, self.padding, self.fill = Path(path), batch_size, padding, fill
        self.mean, self.std, self.seed, self.held_out = mean, std, seed, held_out
        self.train: _Augmented | None = None
        self.test: _Plain | None = None

    def setup(self, stage: str) -> None:
        """Read the images once."""
        if self.train is None:
            images, labels = read(self.path, "train")
            order = np.random.default_rng(0).permutation(len(labels)) if self.held_out else np.arange(len(labels))
            out, kept = np.split(order, [round(self.held_out * len(labels))])
            self.train = _Augmented(images[kept], labels[kept], self)
            test = (images[out], labels[out]) if self.held_out else read(self.path, "test")
            self.test = _Plain(*test, self)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the training images; the last batch of an epoch may be smaller, as the authors' is."""
        assert self.train is not None
        return DataLoader(self.train, self.batch_size, sampler=_Shuffle(self.train), collate_fn=_as_they_are)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the test images: nothing is chosen by them."""
        assert self.test is not None
        return DataLoader(self.test, 1000, collate_fn=_as_they_are)


class _Plain(Dataset[tuple[Tensor, Tensor]]):
    """Whole batches at once, as floats."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.uint8], data: Images) -> None:
        pixels = torch.from_numpy(images if images.ndim == 4 else images[..., None]).permute(0, 3, 1, 2)
        self.images, self.labels = pixels.contiguous(), torch.from_numpy(labels.astype(np.int64))
        scale = 255 * torch.tensor(data.std)
        self.scale, self.shift = (1 / scale)[:, None, None], (torch.tensor(data.mean) * 255 / scale)[:, None, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        return self.as_they_are(rows)

    def as_they_are(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Return images as floats, and their labels, without augmentation."""
        index = torch.tensor(rows)
        return self._floats(self.images[index]), self.labels[index]

    def _floats(self, pixels: Tensor) -> Tensor:
        return pixels.float().mul_(self.scale).sub_(self.shift)


class _Augmented(_Plain):
    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.uint8], data: Images) -> None:
        super().__init__(images, labels, data)
        self.seed, self.generator, self.places = data.seed, torch.Generator(), 2 * data.padding + 1
        height, width = self.images.shape[-2:]
        around = (data.padding,) * 4
        both = torch.stack([self.images, self.images.flip(-1)], dim=1)
        padded = torch.nn.functional.pad(both, around, value=data.fill)
        # A view of all places of all images, (n, 2, channels, places, places, height, width): nothing is copied.
        self.windows = padded.unfold(-2, height, 1).unfold(-2, width, 1)

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        index, n = torch.tensor(rows), len(rows)
        mirrored = torch.randint(2, (n,), generator=self.generator)
        down, right = torch.randint(self.places, (2, n), generator=self.generator)
        pixels = self.windows.permute(0, 1, 3, 4, 2, 5, 6)[index, mirrored, down, right]
        return self._floats(pixels), self.labels[index]


class _Shuffle(Sampler[int]):
    """A new order each epoch, which seed and epoch name."""

    def __init__(self, data: _Augmented) -> None:
        self.data, self.epoch = data, 0

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch; Lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[int]:
        generator = self.data.generator.manual_seed(self.data.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(len(self.data), generator=generator).tolist())


def _as_they_are(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


def read(path: Path, part: str) -> Arrays:
    """Return images and labels of a part, ``"train"`` or ``"test"``."""
    if path.is_dir():
        images, labels = (gzip.decompress((path / name).read_bytes()) for name in _IDX[part])
        sizes = np.frombuffer(images, ">i4", count=4)[1:]
        pixels = np.frombuffer(images, np.uint8, offset=16).reshape(sizes)
        return pixels.copy(), np.frombuffer(labels, np.uint8, offset=8)
    with np.load(path) as arrays:
        labels_ = arrays[f"{part}_labels"]
        if f"{part}_images" in arrays:
            return arrays[f"{part}_images"], labels_
        from PIL import Image

        jpeg, ends = arrays[f"{part}_jpeg"].tobytes(), arrays[f"{part}_offsets"]
        files = (io.BytesIO(jpeg[first:end]) for first, end in pairwise(ends))
        return np.stack([np.asarray(Image.open(file)) for file in files]), labels_
