"""How Lightning goes through batches: by number, from where a run had stopped, each process its part of each."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

from lightning_gap.monge.samples.batches import HeldOutBatches, UnpairedBatch, UnpairedBatches

__all__ = ["BatchLoader", "BatchNumbers", "NumberedLoader", "batch_loader", "fitting_batch_size", "own_randomness"]


def fitting_batch_size(batch_size: int, smallest: int, replicas: int, *, default: bool) -> int:
    """Return the batch size of a device, which gives way to the smallest set where it is the default."""
    if default and batch_size * replicas > smallest >= replicas:
        batch_size = smallest // replicas
        rank_zero_warn(f"the default batch_size shrinks to {batch_size} on each of {replicas} devices")
    if batch_size * replicas > smallest:
        what = f"{replicas} devices needs {batch_size * replicas}" if replicas > 1 else "a device needs as many"
        raise ValueError(
            f"batch_size={batch_size} on {what} samples of each set, the training split has {smallest}: "
            f"use batch_size <= {smallest // replicas}"
        )
    return batch_size


class BatchNumbers(DistributedSampler[Any]):
    """All batch numbers in turn, on every process, each of which takes its part of each batch.

    In training these are ``(epoch, step)``, from where a run that resumes within an epoch had stopped.
    """

    def __init__(self, batches: UnpairedBatches | HeldOutBatches, trainer: Trainer | None = None) -> None:
        # A distributed sampler, so that Lightning does not wrap another one around it.
        super().__init__(cast(Dataset[Any], range(batches.steps)), num_replicas=1, rank=0, shuffle=False)
        self.trainer = trainer
        self.epochs = isinstance(batches, UnpairedBatches)
        self._resumed_at: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        numbers = range(self._start(), len(self))
        return iter([(self.epoch, step) for step in numbers] if self.epochs else numbers)

    def _start(self) -> int:
        """Return how many batches of this epoch the checkpoint's run has seen."""
        if self.trainer is None or self.trainer.ckpt_path is None:
            return 0
        # Lightning counts batches in the checkpoint, and leaves it to the loader to skip them.
        here = (self.epoch, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready)
        if self._resumed_at is None:
            self._resumed_at = here
        # A callback that goes through the loader later in that epoch sees all of it.
        return here[1] if here == self._resumed_at else 0


class NumberedLoader(DataLoader[Any]):
    """A loader of batches by their numbers, whatever torch's default device.

    Lightning numbers the dataset's items anew to overfit a few of them. These are batches, and its length is samples.
    """

    def __init__(self, dataset: Dataset[Any], *, sampler: Any = None, **options: Any) -> None:
        if isinstance(sampler, SequentialSampler) and hasattr(dataset, "steps"):
            sampler = SequentialSampler(range(dataset.steps))
        super().__init__(dataset, sampler=sampler, **options)

    def __iter__(self) -> Any:
        # An iterator draws its workers' seed on the default device, by a generator of the CPU.
        with torch.device("cpu"):
            return super().__iter__()


class BatchLoader(NumberedLoader):
    """A loader that asks for the first number when the first batch is wanted, and resumes within an epoch.

    Lightning makes the iterator before it tells the epoch, and before it knows whether it resumes.
    """

    def __iter__(self) -> Iterator[UnpairedBatch]:  # type: ignore[override]
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the trainer's count of batches and the seed are the state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing; that there is a method tells Lightning that this loader resumes."""


def batch_loader(
    batches: UnpairedBatches | HeldOutBatches, trainer: Trainer | None = None, num_workers: int = 0
) -> NumberedLoader:
    """Return the loader of batches: of training, for any number of epochs, or else of validation or test."""
    return (BatchLoader if isinstance(batches, UnpairedBatches) else NumberedLoader)(
        batches,
        sampler=BatchNumbers(batches, trainer),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        generator=own_randomness(),
    )


def own_randomness() -> torch.Generator:
    """Return a generator for a loader, which would draw its workers' seed from the global one otherwise."""
    return torch.Generator(device="cpu").manual_seed(0)


def _as_it_is(batch: Any) -> Any:
    return batch
