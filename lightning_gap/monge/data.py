"""Unpaired samples of two populations, as a LightningDataModule."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_gap.monge.batches import UnpairedBatch, shuffled
from lightning_gap.monge.samples import check_pair
from lightning_gap.parallel import data_parallel_rank, data_parallel_size

__all__ = ["SamplesDataModule", "UnpairedBatch", "UnpairedBatches", "UnpairedSamples"]

Batch = tuple[Tensor, Tensor]


class UnpairedSamples(Dataset[Batch]):
    """Samples of a source and of a target, which have nothing to do with each other row by row.

    Args:
        source: ``(n, d)`` samples.
        target: ``(m, d)`` samples.
    """

    def __init__(self, source: Tensor, target: Tensor) -> None:
        self.source = source
        self.target = target

    def __len__(self) -> int:
        return max(len(self.source), len(self.target))

    def __getitem__(self, rows: Batch) -> Batch:
        """Return the samples at the rows ``(source_rows, target_rows)``, a whole batch at once."""
        if not isinstance(rows, tuple):
            raise TypeError(
                f"unpaired samples are read by batches of rows, got the index {rows!r} of another sampler: "
                "leave the sampler alone; in place of Trainer(overfit_batches=...), give fewer samples"
            )
        return self.source[rows[0]], self.target[rows[1]]


class UnpairedBatches(DistributedSampler[Batch]):
    """Rows of random batches, source and target shuffled independently, anew in each epoch.

    An epoch visits each sample of the larger set once, but for a last incomplete batch; the smaller set is shuffled
    again and again meanwhile. The order follows from seed and epoch alone, so a resumed run sees what the
    uninterrupted one would have seen.

    Args:
        samples: What the rows point into.
        batch_size: Rows of each set in a batch, on each replica.
        num_replicas: How many replicas share the batches.
        rank: Which of them this is.
        seed: Seed of the shuffles.
    """

    def __init__(
        self, samples: UnpairedSamples, batch_size: int, *, num_replicas: int = 1, rank: int = 0, seed: int = 0
    ) -> None:
        super().__init__(samples, num_replicas=num_replicas, rank=rank, seed=seed)
        self.samples = samples
        self.batch_size = batch_size

    def __len__(self) -> int:
        return max(1, len(self.samples) // (self.batch_size * self.num_replicas))

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        rows = len(self) * self.batch_size * self.num_replicas
        source, target = (shuffled(len(s), rows, generator) for s in (self.samples.source, self.samples.target))
        for start in range(self.rank * self.batch_size, rows, self.batch_size * self.num_replicas):
            part = slice(start, start + self.batch_size)
            yield source[part], target[part]


class SamplesDataModule(LightningDataModule):
    """Two sets of unpaired samples, split and batched for :class:`~lightning_gap.MongeMap`.

    Each set is split at random by rows; a batch is a pair ``(source, target)`` of ``(batch_size, d)`` tensors drawn
    independently. Validation and test see their whole split as one batch, up to ``eval_batch_size`` rows; prediction
    maps all source samples in their order.

    Args:
        source: ``(n, d)`` samples: a tensor, or anything that NumPy makes an array of. Float64 in either set makes
            both float64, other numbers become float32.
        target: ``(m, d)`` samples.
        batch_size: Samples of each set in a training batch, on each device.
        val_fraction: Share of each set held out for validation, in [0, 1); at least one sample where it is not 0.
        test_fraction: Share of each set held out for the test, likewise.
        eval_batch_size: Largest number of held-out samples of each set that are compared at once.
        seed: Seed of the split and of the shuffles.
        num_workers: Workers of the training loader.

    Raises:
        TypeError: ``batch_size`` or another count is no integer.
        ValueError: Shapes do not fit, values are not finite, fractions leave nothing to train on, or ``batch_size``
            is larger than the training split.
        MisconfigurationException: ``trainer.validate`` or ``trainer.test`` is called with nothing held out.

    Example:
        >>> import torch
        >>> data = SamplesDataModule(torch.randn(100, 2), torch.randn(80, 2), batch_size=32)
        >>> data.setup("fit")
        >>> [tuple(t.shape) for t in next(iter(data.train_dataloader()))]
        [(32, 2), (32, 2)]
    """

    def __init__(
        self,
        source: ArrayLike | Tensor,
        target: ArrayLike | Tensor,
        *,
        batch_size: int = 256,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        eval_batch_size: int = 2048,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        source, target = _as_samples("source", source), _as_samples("target", target)
        dtype = torch.promote_types(source.dtype, target.dtype)
        source, target = source.to(dtype), target.to(dtype)
        check_pair("source", source, "target", target)
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("seed", seed, 0),
            ("num_workers", num_workers, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
            if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction < 1:
                raise ValueError(f"{name} must be in [0, 1), got {fraction!r}")
        if val_fraction + test_fraction >= 1:
            raise ValueError(
                f"val_fraction + test_fraction = {val_fraction + test_fraction} leaves nothing to train on"
            )
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.source = source
        self.splits = _split(source, target, val_fraction, test_fraction, seed)
        train = self.splits["train"]
        smallest = min(len(train.source), len(train.target))
        if batch_size > smallest:
            raise ValueError(
                f"batch_size={batch_size} is larger than the training split ({len(train.source)} source and "
                f"{len(train.target)} target samples): use batch_size <= {smallest}, or hold out less"
            )

    @property
    def dim(self) -> int:
        """Dimension of the samples."""
        return int(self.source.shape[1])

    def training_samples(self) -> Batch:
        """Return all source and target samples that are trained on."""
        return self.splits["train"].source, self.splits["train"].target

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of random unpaired batches."""
        size, rank = (data_parallel_size(self.trainer), data_parallel_rank(self.trainer)) if self.trainer else (1, 0)
        train = self.splits["train"]
        smallest = min(len(train.source), len(train.target))
        if self.batch_size * size > smallest:
            raise ValueError(
                f"batch_size={self.batch_size} on {size} devices needs {self.batch_size * size} samples of each set, "
                f"the training split has {smallest}: use batch_size <= {smallest // size}"
            )
        sampler = UnpairedBatches(train, self.batch_size, num_replicas=size, rank=rank, seed=self.seed)
        return DataLoader(
            train,
            sampler=sampler,
            batch_size=None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return the held-out validation samples as one batch; none in a fit where ``val_fraction`` is 0."""
        return self._held_out("val")

    def test_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return the held-out test samples as one batch."""
        return self._held_out("test")

    def predict_dataloader(self) -> DataLoader[Tensor]:
        """Return all source samples in their order."""
        return DataLoader(_Rows(self.source), batch_size=self.eval_batch_size)

    def _held_out(self, split: str) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        samples = self.splits[split]
        if not (len(samples.source) and len(samples.target)):
            if self.trainer and self.trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING):
                raise MisconfigurationException(
                    f"{split}_fraction=0 holds no samples out: give SamplesDataModule({split}_fraction=0.1)"
                )
            return []
        return DataLoader(_OneBatch(samples, self.eval_batch_size), batch_size=None)


class _OneBatch(Dataset[Batch]):
    """A split as one batch; its rows are in random order already."""

    def __init__(self, samples: UnpairedSamples, most: int) -> None:
        self.batch = samples.source[:most], samples.target[:most]

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Batch:
        if index:
            raise IndexError(index)
        return self.batch


class _Rows(Dataset[Tensor]):
    def __init__(self, samples: Tensor) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tensor:
        return self.samples[index]


def _as_samples(name: str, samples: ArrayLike | Tensor) -> Tensor:
    if not isinstance(samples, Tensor):
        array = np.asarray(samples)
        if array.dtype.kind not in "fiub":
            raise TypeError(f"{name} must hold real numbers, got an array of {array.dtype}: convert it first")
        # A copy: read-only arrays and foreign byte orders are welcome, and later changes to the array do no harm.
        samples = torch.from_numpy(np.array(array, dtype=np.float64 if array.dtype == np.float64 else np.float32))
    if samples.is_complex():
        raise TypeError(f"{name} must hold real numbers, got a tensor of {samples.dtype}: convert it first")
    return samples.detach() if samples.dtype == torch.float64 else samples.detach().float()


def _split(
    source: Tensor, target: Tensor, val_fraction: float, test_fraction: float, seed: int
) -> Mapping[str, UnpairedSamples]:
    """Split both sets at random; the rows of each split are in random order."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for samples in (source, target):
        n = len(samples)
        order = torch.randperm(n, generator=generator)
        n_test, n_val = (max(1, round(n * part)) if part else 0 for part in (test_fraction, val_fraction))
        n_train = n - n_val - n_test
        if n_train < 1:
            raise ValueError(
                f"val_fraction={val_fraction} and test_fraction={test_fraction} of {n} samples leave nothing to train "
                "on: lower them, or set them to 0"
            )
        parts.append([samples[rows] for rows in order.split([n_train, n_val, n_test])])
    return {name: UnpairedSamples(x, y) for name, x, y in zip(("train", "val", "test"), *parts, strict=True)}
