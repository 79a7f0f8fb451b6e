"""What a training, validation or test step of a map is given, and how it is drawn."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

from lightning_gap.monge.samples.draws import FiniteSamples, Part, Population, Turn, generator

__all__ = [
    "BatchLoader",
    "BatchNumbers",
    "HeldOut",
    "HeldOutBatches",
    "NumberedLoader",
    "Predicted",
    "UnpairedBatch",
    "UnpairedBatches",
    "batch_loader",
    "fitting_batch_size",
    "own_randomness",
]

# First entries of the keys of random draws, so that none is used for two things.
TRAIN, CONDITIONS = 3, 4


class UnpairedBatch(NamedTuple):
    """Samples of a source and of a target, which have nothing to do with each other row by row.

    Under data parallelism a batch is this process's part of the global batch: joined by rank, samples and weights are
    those of one process at the same global batch size.

    Attributes:
        source: ``(n, d)`` samples, or ``(K, n, d)`` for K conditions.
        target: ``(m, d)`` samples, or ``(K, m, d)``.
        source_weights: ``(n,)`` or ``(K, n)`` weights, which sum to 1 in each condition of the global batch; ``None``
            where all samples count the same.
        target_weights: ``(m,)`` or ``(K, m)`` weights, likewise.
        condition: ``(K,)`` labels (int64), or ``(K, p)`` vectors; ``None`` without conditions.
        true_images: Images of ``source`` under a known map, of its shape, or ``None``.
        target_again: Further samples of the target, from those that are trained on: their distance to ``target`` is
            the floor of every score. Only in validation and test batches.

    Example:
        >>> import torch
        >>> batch = UnpairedBatch(torch.zeros(4, 2), torch.ones(3, 2))
        >>> batch.target.shape, batch.condition
        (torch.Size([3, 2]), None)
    """

    source: Tensor
    target: Tensor
    source_weights: Tensor | None = None
    target_weights: Tensor | None = None
    condition: Tensor | None = None
    true_images: Tensor | None = None
    target_again: Tensor | None = None


Pair = tuple[Population, Population]


class UnpairedBatches(Dataset[UnpairedBatch]):
    """Training batches by ``(epoch, step)``, each the same whenever it is asked for.

    Source and target are shuffled independently and anew in each epoch, by the seed alone; a set that is smaller than
    what an epoch takes is gone through again. ``size`` counts the samples of each side, and condition, in the global
    batch of all ``num_replicas`` processes; ``conditions`` are ``(K,)`` labels or ``(K, p)`` vectors of the K pairs.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        size: int,
        steps: int,
        *,
        conditions: Tensor | None = None,
        per_batch: int | None = None,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        self.pairs = list(pairs)
        self.size = size
        self.steps = steps
        self.conditions = conditions
        self.per_batch = per_batch
        self.seed = seed
        self.num_replicas = num_replicas
        self.part = slice(rank * size // num_replicas, (rank + 1) * size // num_replicas)

    def __len__(self) -> int:
        """Return how many samples of the smaller set whole batches hold, of this process: not how many batches.

        Lightning's batch size finder takes it for the largest batch. It doubles what is smaller.
        """
        sizes = [len(side) for pair in self.pairs for side in pair if isinstance(side, FiniteSamples)]
        if not sizes:
            raise TypeError("samplers and streams have no length")
        return min(sizes) // self.size * (self.size // self.num_replicas)

    @property
    def samples_in_batch(self) -> int:
        """How many samples of a side this process has in a batch, over its conditions."""
        return self.size // self.num_replicas * min(self.per_batch or len(self.pairs), len(self.pairs))

    @property
    def samples_in_epoch(self) -> int:
        """How many samples an epoch goes through, over all processes: whole batches, of which the rest is dropped.

        Those of the larger set where an epoch is one pass through it, so that it tells of other batches, too.
        """
        batch = self.samples_in_batch * self.num_replicas
        sizes = [len(side) for pair in self.pairs for side in pair if isinstance(side, FiniteSamples)]
        largest = max(sizes, default=0)
        whole = len(self.pairs) == 1 and largest // self.size == self.steps
        return largest if whole else self.steps * batch

    def __getitem__(self, number: tuple[int, int] | int) -> UnpairedBatch:
        """Return a batch of an epoch; a plain number is that of one of epoch 0, which comes again and again."""
        if not isinstance(number, tuple):
            if self.num_replicas > 1:
                raise TypeError(
                    "the processes share each batch, and cannot take different ones of another sampler: "
                    "use one process with Trainer(overfit_batches=...), or give fewer samples"
                )
            number = 0, int(number)
        epoch, step = number
        if not 0 <= step < self.steps:
            raise IndexError(f"batch {step} of {self.steps}")
        if self.conditions is None:
            return _joined([self._draw(0, epoch, step)], None)
        chosen = torch.arange(len(self.pairs), device="cpu")
        if self.per_batch is not None and self.per_batch < len(self.pairs):
            draws = generator(self.seed, CONDITIONS, epoch, step)
            chosen = torch.randperm(len(self.pairs), generator=draws, device="cpu")[: self.per_batch].sort().values
        return _joined([self._draw(int(k), epoch, step) for k in chosen], self.conditions[chosen])

    def _draw(self, pair: int, epoch: int, step: int) -> tuple[Part, Part]:
        source, target = (
            population.draw(Turn((self.seed, TRAIN, side, pair), epoch, step, self.steps, self.size, self.part))
            for side, population in enumerate(self.pairs[pair])
        )
        return source, target


@dataclass
class HeldOut:
    """The held-out samples of one stage."""

    pairs: list[tuple[FiniteSamples, FiniteSamples]]  # of each condition, in random order
    again: list[Tensor | None]  # training samples of each target, as many; None if not trained on
    places: Tensor | None = None  # (K,) of the pairs' conditions among the names; none, or empty, without conditions
    vectors: Tensor | None = None  # of the named conditions, where these are no labels
    titles: Sequence[str] = ()  # how messages call each pair

    @property
    def conditions(self) -> Tensor | None:
        """Return ``(K,)`` labels or ``(K, p)`` vectors of the pairs; ``None`` without conditions."""
        if self.places is None or not len(self.places):
            return None
        return self.places if self.vectors is None else self.vectors[self.places]


class HeldOutBatches(Dataset[UnpairedBatch]):
    """The first ``most`` held-out samples as one batch, or one of ``(1, n, d)`` for each condition."""

    def __init__(self, given: HeldOut, most: int, *, num_replicas: int = 1, rank: int = 0) -> None:
        def part(size: int) -> slice:
            return slice(rank * size // num_replicas, (rank + 1) * size // num_replicas)

        self.batches: list[UnpairedBatch] = []
        self._largest = max((len(side) // num_replicas for pair in given.pairs for side in pair), default=0)
        for k, ((source, target), further) in enumerate(zip(given.pairs, given.again, strict=True)):
            smallest = min(len(source), len(target), *([] if further is None else [len(further)]))
            if smallest < num_replicas:
                raise ValueError(
                    f"{given.titles[k]} has {smallest} samples, fewer than the {num_replicas} processes that share "
                    f"them: hold out at least {num_replicas}"
                )
            condition = None if given.conditions is None else given.conditions[k : k + 1]
            batch = _joined([(source.first(most, part), target.first(most, part))], condition)
            if further is not None:
                further = further[part(len(further))]
                batch = batch._replace(target_again=further if condition is None else further[None])
            self.batches.append(batch)

    @property
    def steps(self) -> int:
        """Number of batches."""
        return len(self.batches)

    def __len__(self) -> int:
        """Return how many samples of each side the largest batch could hold: not how many batches."""
        return self._largest

    def __getitem__(self, index: int) -> UnpairedBatch:
        """Return the batch of a condition, or the one there is."""
        return self.batches[index]


@dataclass
class Predicted(Dataset[Any]):
    """Raw samples of the source, with conditions as pairs."""

    samples: Tensor
    rows: Tensor  # rows to map, one after another
    codes: Tensor | None = None  # places of their conditions among the names
    vectors: Tensor | None = None  # vectors of the named conditions, where these are no labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        """Return a sample, or a pair of it and its condition."""
        sample = self.samples[self.rows[index]]
        if self.codes is None:
            return sample
        return sample, self.codes[index] if self.vectors is None else self.vectors[self.codes[index]]


def _joined(pairs: Sequence[tuple[Part, Part]], conditions: Tensor | None) -> UnpairedBatch:
    """Return one batch of the pairs: stacked, where there are conditions."""
    join: Callable[[list[Tensor]], Tensor] = torch.stack if conditions is not None else _only
    (source, source_weights, images), (target, target_weights, _) = (
        [None if any(x is None for x in column) else join(list(column)) for column in zip(*side, strict=True)]
        for side in zip(*pairs, strict=True)
    )
    assert source is not None
    assert target is not None
    return UnpairedBatch(source, target, source_weights, target_weights, conditions, images)


def _only(tensors: list[Tensor]) -> Tensor:
    return tensors[0]


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

    @property
    def samples_in_batch(self) -> int:
        """How many samples of a side this process has in a batch: what learning rates are scaled by."""
        return cast(UnpairedBatches, self.dataset).samples_in_batch

    @property
    def samples_in_epoch(self) -> int:
        """How many samples an epoch goes through, over all processes."""
        return cast(UnpairedBatches, self.dataset).samples_in_epoch

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
