"""A loader whose batches change in size while it is read: torch alone."""

import os
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_gap.regime.parts import Part

__all__ = ["ScheduledLoader", "ScheduledSource", "draws_of", "is_schedulable", "worker_seeds"]


def is_schedulable(loader: Any) -> bool:
    """Return whether a loader draws batches of one size of a map-style data set, so that they may have other sizes."""
    return (
        type(loader).__iter__ is DataLoader.__iter__
        and not isinstance(loader.dataset, IterableDataset)
        and type(loader.batch_sampler) is BatchSampler
    )


def draws_of(loader: DataLoader[Any], *, seed: int) -> Callable[[int], Sequence[Any]]:
    """Return the order of the samples of each pass, the same in every process that has the same seed.

    It is the loader's own sampler that draws, with torch's generator, and its own one, at a seed of the pass. Of a
    ``DistributedSampler`` the whole pass is drawn.

    Example:
        >>> draws = draws_of(DataLoader(range(5), shuffle=True), seed=0)
        >>> sorted(draws(0)), draws(0) == draws(0), draws(0) == draws(1)
        ([0, 1, 2, 3, 4], True, False)
    """
    sampler: Any = loader.sampler
    if isinstance(sampler, DistributedSampler):
        source: Any = sampler.dataset
        sampler = RandomSampler(source) if sampler.shuffle else range(len(source))

    if type(sampler) is SequentialSampler:
        sampler = range(len(sampler))  # which draws nothing

    def draw(epoch: int) -> Sequence[Any]:
        if isinstance(sampler, range):
            return sampler
        set_epoch = getattr(sampler, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
        own, here = getattr(sampler, "generator", None), (1_000_003 * seed + epoch) % 2**63
        with _seeded(here):
            if isinstance(own, torch.Generator):
                own.manual_seed(here)
            return list(sampler)

    return draw


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed whatever a sampler may draw with, and give all of it back."""
    before, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002 - samplers of users draw with it
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds the devices that train too
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(numpys)  # noqa: NPY002


class _Batches:
    """The samples of each part of a pass; it tells which part it is as it draws it."""

    def __init__(self, loader: "ScheduledLoader") -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[list[Any]]:
        loader = self._loader
        order: Sequence[Any] | None = None
        epoch = -1
        for part in loader.parts():
            if order is None or part.epoch != epoch:
                epoch, order = part.epoch, loader.draws(part.epoch)
            loader.drawn.append(part)
            yield list(order[part.first : part.first + part.size])


class ScheduledLoader:
    """A ``DataLoader``'s data, workers and collation, in batches that a schedule tells while they are drawn.

    Args:
        loader: Whose data is loaded.
        draws: The order of each pass.
        parts: Yields the parts of this process that are still to come in the pass.
        length: How many batches the pass has, those that are over included; ``None`` where it is not known.
        seed: Of what workers draw.
        worker_init: What each worker calls with its number, where the loader has nothing for it.

    Attributes:
        drawn: Parts whose samples have been asked for, workers being ahead.
        batch_size: Samples of the present batch.
        even: Whether the parts of its update are of one size on all devices.
        coming: Parts whose batches have been handed out, and are not trained on yet.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        draws: Callable[[int], Sequence[Any]],
        parts: Callable[[], Iterator[Part]],
        length: Callable[[], int] | None,
        seed: int = 0,
        worker_init: Callable[[int], None] | None = None,
    ) -> None:
        self._users = loader
        self.draws, self.parts = draws, parts
        self.drawn: deque[Part] = deque()
        self.coming: deque[Part] = deque()
        self.dataset = loader.dataset
        self.batch_size = int(loader.batch_size or 1)
        self.even = True
        self._length = length
        options: dict[str, Any] = {"prefetch_factor": loader.prefetch_factor} if loader.num_workers else {}
        self._loader: DataLoader[Any] = DataLoader(
            loader.dataset,
            batch_sampler=_Batches(self),
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn or worker_init,
            multiprocessing_context=loader.multiprocessing_context,
            generator=torch.Generator().manual_seed(seed % 2**63),  # which training does not share
            persistent_workers=False,  # workers of a pass that was left would hand out its batches in the next
            **options,
        )
        if length is not None:
            # An instance's __len__ is not asked for, and a class that has one is taken for sized.
            self.__class__ = _SizedLoader

    def __iter__(self) -> Iterator[Any]:
        self.drawn.clear()
        self.coming.clear()
        for batch in self._loader:
            self.coming.append(self.drawn.popleft())
            yield batch

    def __getattr__(self, name: str) -> Any:
        if name == "_users":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._users, name)  # its sampler, its workers, as other callbacks ask

    @property
    def stands_for(self) -> DataLoader[Any]:
        """The user's loader, of one process and one size of batches, for those who need batches of their own."""
        return self._users

    def take(self) -> Part:
        """Return what the present batch is, once it is trained on."""
        part = self.coming.popleft()
        self.batch_size, self.even = part.size, part.weight == 1
        return part

    # Lightning takes a loader with these two for one that resumes within a pass. The place is in the callback's state.
    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the place is where training is, which is not here."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up nothing.

        Args:
            state: Of :meth:`state_dict`.
        """


class _SizedLoader(ScheduledLoader):
    def __len__(self) -> int:
        assert self._length is not None
        return self._length()


def worker_seeds(rank: int) -> Callable[[int], None] | None:
    """Return what seeds the workers of a process, as Lightning does where ``seed_everything(workers=True)`` asks.

    Args:
        rank: Of the process, so that no two augment alike.
    """
    if not int(os.environ.get("PL_SEED_WORKERS", "0")):
        return None
    from lightning.fabric.utilities.seed import pl_worker_init_function

    return partial(pl_worker_init_function, rank=rank)


class ScheduledSource:
    """Where a trainer gets its training loader from, with what is made of it.

    Args:
        source: The trainer's own.
        made_of: From the loader to what is loaded in its place.
    """

    def __init__(self, source: Any, made_of: Callable[[Any], Any]) -> None:
        self._source, self._made_of = source, made_of

    def __getattr__(self, name: str) -> Any:
        if name == "_source":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._source, name)

    def dataloader(self) -> Any:
        """Return the loader."""
        return self._made_of(self._source.dataloader())
