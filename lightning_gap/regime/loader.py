"""How many samples an update sees, and how many updates an epoch has, read from a trainer and its training loader."""

from collections.abc import Mapping, Sized
from dataclasses import dataclass
from numbers import Integral
from typing import Any, cast

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import BatchSampler, DistributedSampler, IterableDataset, RandomSampler

from lightning_gap.regime.clock import updates_in_epoch
from lightning_gap.trainer.internals.of_lightning import shards_loaders, training_source
from lightning_gap.trainer.strategy import data_parallel_size

__all__ = [
    "DataNotReady",
    "Pass",
    "batch_of_update",
    "check_first_batch",
    "effective_batch_size",
    "pass_over_data",
    "same_data",
    "training_loader",
]

_GIVEN = "or pass batch_size=, and with it samples=, max_steps without max_epochs, or train_longer=False"
_LR_ONLY = (
    "pass samples=, the samples of an epoch, set max_steps without max_epochs, or pass train_longer=False (with "
    "batch_size=) for the learning rate alone"
)


class DataNotReady(MisconfigurationException):
    """The module's ``train_dataloader`` cannot be called yet, or not at all; its own error is the cause."""


@dataclass(frozen=True)
class Pass:
    """One pass over the training samples, as the loader describes it."""

    samples: int  # over all replicas
    drop_last: bool
    batches: int  # of one replica
    batch_size: int  # over all replicas
    replicas: int = 1

    def numbers_of_batches(self, accumulated: int) -> tuple[int, ...]:
        """Return what a user may take for the updates of an epoch: batches whole or not, of a replica or of all."""
        replicas_batch = self.batch_size // max(1, self.replicas)
        sizes = {self.batch_size, replicas_batch, self.batch_size * accumulated, replicas_batch * accumulated}
        counts = {self.batches, self.batches // accumulated}
        counts |= {count for size in sizes for count in (self.samples // size, -(-self.samples // size))}
        return tuple(sorted(counts))

    def samples_until(self, batches: int) -> int:
        """Return how many samples the first batches of a pass have."""
        return min(self.samples, batches * self.batch_size)


def effective_batch_size(trainer: Trainer) -> int:
    """Return how many samples one optimizer update of a trainer sees.

    The product of the loader's batch size, ``accumulate_grad_batches`` and the data-parallel replicas. Tensor-parallel
    ranks share their samples and do not count.

    Args:
        trainer: A trainer whose training data is attached, so inside any hook of ``fit`` from ``setup`` on.

    Returns:
        Samples per update.

    Raises:
        MisconfigurationException: If there is no training loader yet, or its batch size is unknown.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Callback, Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> class Show(Callback):
        ...     def on_train_start(self, trainer, pl_module):
        ...         print(effective_batch_size(trainer))
        >>> trainer = Trainer(
        ...     max_epochs=1, accumulate_grad_batches=4, accelerator="cpu", callbacks=[Show()], logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> data = torch.utils.data.DataLoader(torch.randn(64, 32), batch_size=8, num_workers=0)
        >>> trainer.fit(BoringModel(), data)
        32
    """
    return batch_of_update(trainer, training_loader(trainer))


def batch_of_update(trainer: Trainer, loader: Any) -> int:
    """Return :func:`effective_batch_size` where the loader is known."""
    return loader_batch_size(loader) * trainer.accumulate_grad_batches * data_parallel_size(trainer)


def training_loader(trainer: Trainer) -> Any:
    """Return the one training loader, from the trainer if it has loaded it, else from where the trainer will get it."""
    source = trainer.train_dataloader
    if source is None:
        source = training_source(trainer)
    if isinstance(source, (LightningModule, LightningDataModule)):
        try:
            # Not through the trainer: loading there before a restore would lose a stateful loader's position.
            with isolate_rng(include_cuda=False):
                source = source.train_dataloader()
        except Exception as error:
            raise DataNotReady(
                f"{type(source).__name__}.train_dataloader() cannot be called before the module's own setup ({error}). "
                f"Pass the loader to trainer.fit, move it to a LightningDataModule, {_GIVEN}."
            ) from error
    if source is None:
        raise MisconfigurationException(
            "The trainer has no training data yet: ask inside a hook of trainer.fit, from setup on."
        )
    loaders = (source if isinstance(source, CombinedLoader) else CombinedLoader(source)).flattened
    if len(loaders) != 1:
        raise MisconfigurationException(
            f"There are {len(loaders)} training loaders, so a batch size cannot be told. Use one, {_GIVEN}."
        )
    return loaders[0]


def samples_in_batch(loader: Any) -> int | None:
    """Return what a loader of whole batches says of them, NumPy's integers too; ``None`` where it does not."""
    told = getattr(loader, "samples_in_batch", None)
    return int(told) if isinstance(told, Integral) else None


def loader_batch_size(loader: Any) -> int:
    """Return the batch size of a loader, or of its batch sampler; or what a loader of whole batches says of them."""
    if (told := samples_in_batch(loader)) is not None:
        return told
    for holder in (loader, getattr(loader, "batch_sampler", None)):
        size = getattr(holder, "batch_size", None)
        if isinstance(size, Integral) and int(size) > 0:
            return int(size)
    raise MisconfigurationException(
        f"The batch size of the training loader ({type(loader).__name__}) is unknown: neither it nor its batch_sampler "
        f"has an integer batch_size. Give it one, {_GIVEN}."
    )


def pass_over_data(trainer: Trainer, loader: Any = None, samples: int | None = None) -> Pass:
    """Return what one pass over the training data is, sharding among replicas included, if the loader tells."""
    loader = training_loader(trainer) if loader is None else loader
    batch_sampler = getattr(loader, "batch_sampler", None)
    if samples is not None:
        return _declared_pass(trainer, loader, samples)
    if isinstance(told := getattr(loader, "samples_in_epoch", None), int):  # it has batches of all replicas alone
        replicas = data_parallel_size(trainer)
        batch_size = loader_batch_size(loader) * replicas
        return Pass(samples=told, drop_last=True, batches=len(loader), batch_size=batch_size, replicas=replicas)
    if isinstance(getattr(loader, "dataset", None), IterableDataset) or not isinstance(batch_sampler, BatchSampler):
        raise MisconfigurationException(
            f"The training loader ({type(loader).__name__}, {type(batch_sampler).__name__}) does not tell how many "
            f"samples an epoch has. Use a DataLoader with a map-style dataset and a torch BatchSampler, {_LR_ONLY}."
        )
    sampler: Any = batch_sampler.sampler
    drop_last = batch_sampler.drop_last
    if len(batch_sampler) != updates_in_epoch(len(sampler), batch_sampler.batch_size, drop_last=drop_last):
        raise MisconfigurationException(
            f"The batch sampler {type(batch_sampler).__name__} yields {len(batch_sampler)} batches for {len(sampler)} "
            f"samples by {batch_sampler.batch_size}: its batches vary in size. Use batches of one size, {_LR_ONLY}."
        )
    replicas = data_parallel_size(trainer)
    samples = shard = len(sampler)
    if isinstance(sampler, DistributedSampler):
        samples = len(cast(Sized, sampler.dataset))
    elif replicas > 1:
        if not shards_loaders(trainer):
            raise MisconfigurationException(
                f"use_distributed_sampler=False with a {type(sampler).__name__} on {replicas} replicas does not tell "
                "whether replicas share the samples. Use torch's DistributedSampler, use_distributed_sampler=True, "
                f"{_LR_ONLY}."
            )
        # The trainer's sampler draws on the whole data set, whatever a RandomSampler's num_samples.
        drawn = len(sampler.data_source) if isinstance(sampler, RandomSampler) else samples
        shard = updates_in_epoch(drawn, replicas)
    batches = updates_in_epoch(shard, batch_sampler.batch_size, drop_last=drop_last)
    return Pass(
        samples=samples,
        drop_last=drop_last,
        batches=batches,
        batch_size=batch_sampler.batch_size * replicas,
        replicas=replicas,
    )


def _declared_pass(trainer: Trainer, loader: Any, samples: int) -> Pass:
    replicas = data_parallel_size(trainer)
    try:
        batches = len(loader)
    except (TypeError, NotImplementedError):
        batches = updates_in_epoch(samples, loader_batch_size(loader) * replicas)
    else:
        sharded = isinstance(getattr(loader, "sampler", None), DistributedSampler)
        if replicas > 1 and not sharded and shards_loaders(trainer):
            batches = updates_in_epoch(batches, replicas)
    return Pass(samples=samples, drop_last=False, batches=batches, batch_size=updates_in_epoch(samples, batches))


def same_data(loader: Any, other: Any) -> bool:
    """Return whether two loaders pass over the same training data in the same batches."""
    if loader is other:
        return True
    try:
        sizes = {(len(each.dataset), loader_batch_size(each), type(each.dataset)) for each in (loader, other)}
    except (AttributeError, TypeError, MisconfigurationException):
        return False
    return len(sizes) == 1


def check_first_batch(batch: Any, expected: int) -> None:
    """Refuse a first batch that has not the samples of which the loader tells.

    A batch of no tensors, or one in which anything has as many parts as expected, is believed.
    """
    tensors: list[int] = []
    parts: set[int] = {expected} if getattr(batch, "num_graphs", None) == expected else set()

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            if value.dim():
                tensors.append(len(value))
        elif isinstance(value, Mapping):
            for each in value.values():
                look(each)
        elif isinstance(value, (list, tuple)):
            parts.add(len(value))
            for each in value:
                look(each)

    look(batch)
    if not tensors or expected in parts or expected in tensors:
        return
    found = max(set(tensors), key=tensors.count)
    raise MisconfigurationException(
        f"LargeBatchRegime: the loader tells of {expected} samples in a batch, and the first batch has {found}. If the "
        f"items of its data set are whole batches, pass batch_size= (with {found} samples in a batch: {found} x "
        "accumulate_grad_batches x replicas) and samples= (of an epoch). If a collate function makes several rows of a "
        "sample, or tokens, pass batch_size= in samples. If the data set is smaller than a batch, lower the loader's "
        "batch_size."
    )
