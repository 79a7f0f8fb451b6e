"""What becomes of a scheduler, and of a learning rate, under a regime: states, and the words for them."""

from dataclasses import dataclass
from enum import Enum, auto

__all__ = ["Fate", "Rate", "SchedulerFate"]


class Rate(Enum):
    """Where a run's learning rate comes from."""

    RULED = auto()  # by the rule, from the reference run's
    FOUND = auto()  # by LearningRateFinder, at the batch that runs


class Fate(Enum):
    """Whose lengths a scheduler has, and when it is stepped."""

    AS_IT_WAS = "every {frequency} {interval}(s), as it was"
    THIS_RUNS = "every {frequency} {interval}(s), has this run's length"
    AT_EPOCH_END = "every {frequency} reference epoch(s), at the end of an epoch of this run"
    BY_EPOCHS = "every {frequency} reference epoch(s), {every:g} updates"
    BY_UPDATES = "every {frequency} update(s), as in the reference run"
    BY_PACE = "{every:.4g} times an update, through the reference run's length"


@dataclass(frozen=True)
class SchedulerFate:
    """What becomes of one scheduler; as a string, its line in a log.

    Attributes:
        name: Its class.
        fate: Whose lengths it has.
        interval: What Lightning steps it by.
        frequency: Every how many of these.
        every: In how many updates it is stepped, by epochs; how many times an update, by a pace.
    """

    name: str
    fate: Fate
    interval: str
    frequency: int
    every: float = 0.0

    @property
    def words(self) -> str:
        """What becomes of it."""
        return self.fate.value.format(interval=self.interval, frequency=self.frequency, every=self.every)

    def __str__(self) -> str:
        return f"{self.name}: {self.words}"
