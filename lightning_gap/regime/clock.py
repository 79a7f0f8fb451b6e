"""Epochs and updates: when the reference run steps its schedulers, in the updates of this run, and who steps them."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from math import ceil, floor
from operator import methodcaller
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from lightning_gap.regime.plan import RegimePlan
    from lightning_gap.regime.warmup import Warmup

__all__ = [
    "Fate",
    "Interval",
    "ReferenceClock",
    "RegimeClock",
    "SchedulerFate",
    "Stepping",
    "reference_updates",
    "share_of",
    "updates_in_epoch",
]

# What schedulers are stepped by, as in Lightning's configuration of schedulers.
Interval = Literal["epoch", "step"]


def share_of(train_longer: float) -> Fraction:
    """Return the share that was written: 1/10 for 0.1, which no binary number is."""
    return Fraction(repr(float(train_longer)))


def updates_in_epoch(samples: int, batch_size: int, *, drop_last: bool = False) -> int:
    """Return how many batches one pass over the samples gives: ⌈N/B⌉, or ⌊N/B⌋ where the last is dropped.

    Example:
        >>> updates_in_epoch(50_000, 128), updates_in_epoch(50_000, 4096), updates_in_epoch(50_000, 128, drop_last=True)
        (391, 13, 390)
    """
    return samples // batch_size if drop_last else ceil(samples / batch_size)


def reference_updates(pace: Fraction, update: int, last: int | None) -> int:
    """Return how many updates the reference run has made after some of this run's, at an even pace, none past its last.

    A batch that changes has no pace: :class:`~lightning_gap.regime.parts.PassClock` counts its samples instead.

    Example:
        >>> [reference_updates(Fraction(5, 2), update, 9) for update in range(5)]
        [0, 2, 5, 7, 9]
    """
    passed = floor(pace * update)
    return passed if last is None else min(passed, last)


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
    """What becomes of one scheduler; as a string, its line in a log."""

    name: str  # its class
    fate: Fate
    interval: str  # as in Lightning's configuration, with the frequency
    frequency: int
    every: float = 0.0  # in how many updates it is stepped, by epochs; how many times an update, by a pace

    def __str__(self) -> str:
        words = self.fate.value.format(interval=self.interval, frequency=self.frequency, every=self.every)
        return f"{self.name}: {words}"


class Stepping(NamedTuple):
    """How a scheduler is stepped once, and in which context, by the reference run's epochs and updates behind it."""

    once: Callable[[Any], Any] = methodcaller("step")
    reference: Callable[[int, int], AbstractContextManager[Any]] | None = None


_NOWHERE = nullcontext()
_PLAIN = Stepping()


class ReferenceClock(NamedTuple):
    """When the reference run steps a scheduler, in this run's updates.

    Example:
        >>> clock = ReferenceClock(None, "epoch", 2, 5)
        >>> [update for update in range(1, 31) if clock.steps(update)]
        [10, 20, 30]
        >>> clock = ReferenceClock(None, "step", 2, 5)
        >>> [update for update in range(1, 11) if clock.steps(update)]
        [2, 4, 7, 9]
        >>> clock = ReferenceClock(None, "step", 1, 5, pace=Fraction(5, 2))  # two updates for five of the reference run
        >>> [clock.steps(update) for update in range(1, 5)]
        [2, 3, 2, 3]
    """

    scheduler: Any
    interval: Interval
    frequency: int  # every how many epochs, or every how many updates within an epoch
    updates_per_epoch: int  # of the reference run
    pace: Fraction = Fraction(1)  # reference updates that pass in one of this run
    last: int | None = None  # reference update, where there is one
    stepping: Stepping = _PLAIN

    @classmethod
    def of(
        cls, plan: "RegimePlan", scheduler: Any, interval: Interval, frequency: int = 1, stepping: Stepping = _PLAIN
    ) -> "ReferenceClock":
        """Return when the reference run of a plan, which has lengths, steps a scheduler."""
        per_epoch = plan.reference_updates_per_epoch
        assert per_epoch is not None
        return cls(scheduler, interval, frequency, per_epoch, plan.pace, plan.reference_updates, stepping)

    def steps(self, update: int) -> int:
        """Return how many times the reference run steps the scheduler between the update before and this one."""
        before, after = (self.reference_update(each) for each in (update - 1, update))
        return self.steps_until(after) - self.steps_until(before)

    def reference_update(self, update: int) -> int:
        """Return how many updates the reference run has made after some of this run's."""
        return reference_updates(self.pace, update, self.last)

    def steps_until(self, reference_update: int) -> int:
        """Return how many times the reference run has stepped the scheduler after some of its updates."""
        epochs, within = divmod(reference_update, self.updates_per_epoch)
        if self.interval == "epoch":
            return epochs // self.frequency
        return epochs * (self.updates_per_epoch // self.frequency) + within // self.frequency

    def reference_update_of(self, step: int) -> int:
        """Return after which update of its own the reference run steps the scheduler for the n-th time."""
        if self.interval == "epoch":
            return step * self.frequency * self.updates_per_epoch
        epochs, within = divmod(step - 1, self.updates_per_epoch // self.frequency)
        return epochs * self.updates_per_epoch + (within + 1) * self.frequency

    def step_after(self, reference_update: int) -> None:
        """Step the scheduler as the reference run does after one of its updates."""
        once, reference = self.stepping
        with reference((reference_update - 1) // self.updates_per_epoch, reference_update) if reference else _NOWHERE:
            once(self.scheduler)


class RegimeClock:
    """Steps the reference run's schedulers in this run, and says how far the run is: one :meth:`step` an update.

    :meth:`RegimePlan.apply` returns one.

    Args:
        plan: The plan of the run.
        clocks: When each scheduler is stepped. Those of updates are stepped before those of epochs.
        warmups: Of each optimizer, what warms it up.

    Attributes:
        updates: Updates made, ``None`` before the first is known of.
    """

    def __init__(
        self,
        plan: "RegimePlan",
        clocks: Iterable[ReferenceClock] = (),
        warmups: "Iterable[Warmup]" = (),
    ) -> None:
        self.plan, self.warmups = plan, list(warmups)
        # Within one update, Lightning steps the schedulers of every update before those of every epoch.
        self.clocks = sorted(clocks, key=lambda clock: clock.interval == "epoch")
        self.updates: int | None = None

    def step(self) -> None:
        """Count an update, and step the schedulers that the reference run steps after it."""
        self.advance((self.updates or 0) + 1)

    def advance(self, update: int) -> None:
        """Step the schedulers that the reference run steps up to an update; the updates must not go back."""
        for passed in range((self.updates or 0) + 1, update + 1):
            for clock in self.clocks:
                first, last = (clock.steps_until(clock.reference_update(each)) for each in (passed - 1, passed))
                for step in range(first + 1, last + 1):
                    clock.step_after(clock.reference_update_of(step))
        self.updates = update

    @property
    def reference_epoch(self) -> float:
        """How many epochs of the reference run are over, a part of one included."""
        epoch = self.plan.stretched_epoch
        return float("nan") if epoch is None else float((self.updates or 0) / epoch)

    @property
    def over(self) -> bool:
        """Whether the run has made all its updates."""
        return self.plan.updates is not None and (self.updates or 0) >= self.plan.updates

    def state_dict(self) -> dict[str, Any]:
        """Return where the run is, for a checkpoint; the optimizers and schedulers have states of their own."""
        return {"updates": self.updates or 0, "warmed": [warmup.made for warmup in self.warmups]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where a checkpoint was written.

        Args:
            state_dict: What :meth:`state_dict` returned then.
        """
        self.updates = state_dict["updates"]
        for warmup, made in zip(self.warmups, state_dict["warmed"], strict=True):
            warmup.made = made
