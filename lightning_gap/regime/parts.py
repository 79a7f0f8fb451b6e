"""A pass over the data in updates of changing size, and each update in parts that a device can hold."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Part", "PassClock", "parts_of_update", "updates_of_pass"]


class Part(NamedTuple):
    """What one device does in one forward and backward pass of an update.

    Attributes:
        first: Where its samples begin in the pass.
        size: How many there are, 1 at least.
        weight: What the gradient of its mean loss is multiplied by, for the mean over parts and devices to be the mean
            over samples; 0 where a device has no sample of its own.
        number: Which part of the update it is, from 0.
        parts: How many parts of a device the update has.
        epoch: The pass.
        begins: Where the update begins in the pass.
        ends: Where it ends.
        batch_size: The batch of the schedule, which a last update of a pass may fall short of.
    """

    first: int
    size: int
    weight: float
    number: int
    parts: int
    epoch: int
    begins: int
    ends: int
    batch_size: int

    @property
    def opens(self) -> bool:
        """Whether an update begins with it."""
        return self.number == 0

    @property
    def closes(self) -> bool:
        """Whether the update is made after it."""
        return self.number == self.parts - 1


@dataclass(frozen=True)
class PassClock:
    """Where the reference run, of one batch, is when so many samples of so many passes are over.

    Args:
        samples: Of a pass that are used; ``None`` where passes have no known length, and all is one pass.
        batch_size: The reference run's.

    Example:
        >>> clock = PassClock(samples=100, batch_size=30)
        >>> clock.updates_per_pass, [clock.update(0, at) for at in (0, 29, 30, 99, 100)], clock.update(2, 30)
        (4, [0, 0, 1, 3, 4], 9)
        >>> clock.place(9)
        (2, 30)
    """

    samples: int | None
    batch_size: int

    @property
    def updates_per_pass(self) -> int:
        """How many updates of the reference run a pass has."""
        return 2**62 if self.samples is None else math.ceil(self.samples / self.batch_size)

    def update(self, epoch: int, position: int) -> int:
        """Return how many updates the reference run has made by a place.

        Args:
            epoch: Passes that are over.
            position: Samples of the present pass that are over.
        """
        if self.samples is not None and position >= self.samples:
            return (epoch + 1) * self.updates_per_pass
        return epoch * (0 if self.samples is None else self.updates_per_pass) + position // self.batch_size

    def place(self, update: int) -> tuple[int, int]:
        """Return after how many passes, and how many samples of the next, the reference run has made some updates.

        Args:
            update: How many.
        """
        if self.samples is None:
            return 0, update * self.batch_size
        epoch, within = divmod(update, self.updates_per_pass)
        return epoch, within * self.batch_size

    def seen(self, epoch: int, position: int) -> int:
        """Return the samples seen by a place.

        Args:
            epoch: Passes that are over.
            position: Samples of the present pass that are over.
        """
        return epoch * (self.samples or 0) + position


def updates_of_pass(
    clock: PassClock, batch_at: Callable[[int], int], epoch: int, position: int, end: int | None = None
) -> Iterator[tuple[int, int, int]]:
    """Yield where each update of a pass begins and ends, and its batch by the schedule.

    Args:
        clock: Of a known length.
        batch_at: From the samples seen to the batch.
        epoch: The pass.
        position: Samples of it that are over.
        end: Where it ends, if before its last sample.

    Example:
        >>> clock = PassClock(samples=10, batch_size=2)
        >>> list(updates_of_pass(clock, lambda samples: 2 if samples < 4 else 4, epoch=0, position=0))
        [(0, 2, 2), (2, 4, 2), (4, 8, 4), (8, 10, 4)]
        >>> clock = PassClock(samples=9, batch_size=2)  # the last sample joins those before it
        >>> list(updates_of_pass(clock, lambda samples: 4, epoch=0, position=0))
        [(0, 4, 4), (4, 9, 4)]
    """
    assert clock.samples is not None
    last = clock.samples if end is None else min(end, clock.samples)
    while position < last:
        batch = batch_at(clock.seen(epoch, position))
        ends = min(position + batch, last)
        if last - ends < clock.batch_size < batch:
            ends = last  # what is left is less than the reference run's batch, and no update for a higher rate
        yield position, ends, batch
        position = ends


def parts_of_update(
    begins: int, ends: int, batch_size: int, *, epoch: int, rank: int, ranks: int, most: int | None
) -> Iterator[Part]:
    """Yield what one of several devices does of an update, in parts of about equal size.

    Consecutive samples make a part of an update, and consecutive ones of these a device's.

    Args:
        begins: Where the update begins in the pass.
        ends: Where it ends.
        batch_size: The batch of the schedule.
        epoch: The pass.
        rank: The device.
        ranks: How many there are.
        most: Samples that a device can hold; ``None`` for any number.

    Example:
        >>> for rank in range(2):
        ...     print([(part.first, part.size, part.weight) for part in parts_of_update(
        ...         0, 10, 10, epoch=0, rank=rank, ranks=2, most=3)])
        [(0, 3, 1.2), (5, 3, 1.2)]
        [(3, 2, 0.8), (8, 2, 0.8)]
    """
    total = ends - begins
    parts = 1 if most is None else math.ceil(total / (most * ranks))
    shares = parts * ranks
    if shares == 1 and total:  # of most runs, and made for every update
        yield Part(begins, total, 1.0, 0, 1, epoch, begins, ends, batch_size)
        return
    for number in range(parts):
        first, last = (begins + total * (number + k) // parts for k in (0, 1))
        here = last - first
        start, stop = (first + _share(here, rank + k, ranks) for k in (0, 1))
        size = stop - start
        yield Part(
            first=start if size else first,
            size=size or 1,
            weight=1.0 if size * shares == total else size * shares / total,
            number=number,
            parts=parts,
            epoch=epoch,
            begins=begins,
            ends=ends,
            batch_size=batch_size,
        )


def _share(samples: int, rank: int, ranks: int) -> int:
    """Return how many of the samples the first ranks have, the earlier one more where they are not even."""
    least, more = divmod(samples, ranks)
    return least * rank + min(rank, more)
