"""What a batch schedule makes of the data of a fit: the reference run, and the updates of this one."""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_gap.regime.batches.steps import BatchSteps
from lightning_gap.regime.loader import Pass, loader_batch_size, pass_over_data, training_loader
from lightning_gap.regime.parts import PassClock, updates_of_pass
from lightning_gap.regime.scheduled_loader import is_schedulable
from lightning_gap.regime.weight_averages import FollowingAverages
from lightning_gap.trainer.strategy import data_parallel_size

if TYPE_CHECKING:
    from lightning_gap.regime.batch_schedule_callback import BatchSizeSchedule

__all__ = ["SchedulePlan"]


# How many times its first batch one grows along a scheduler that falls to 0, where no maximum is given.
MOST_GROWTH = 32


class SchedulePlan:
    """Measures the data, decides by what the batch changes, and says which updates there will be.

    Attributes:
        loader: The training loader, once it is known.
        by_loader: Whether batches are drawn from its data, and not accumulated from its batches.
        clock: Where the reference run is after so many samples.
        last: Its updates in all, ``None`` where nothing limits it.
        end: After how many passes, and samples of the next, that is.
        device_batch: Of the loader, where the batch grows by accumulation.
        most: Samples that a device is given in one pass; the loader's batch where the trainer accumulates.
        max_steps: The user's limit of updates, -1 for none: the reference run's.
        min_steps: The user's least number of updates, likewise.
    """

    def __init__(self, owner: "BatchSizeSchedule", trainer: Trainer) -> None:
        self.owner, self.trainer, self.schedule = owner, trainer, owner.schedule
        self.loader: Any = None
        self.data: Pass | None = None
        self.by_loader = False
        self.clock = PassClock(None, 1)
        self.last: int | None = None
        self.end: tuple[int, int] | None = None
        self.device_batch = 1
        self.most = owner.max_device_batch_size
        self.max_steps = trainer.fit_loop.epoch_loop.max_steps
        self.min_steps = trainer.fit_loop.epoch_loop.min_steps
        self._made = False

    @property
    def replicas(self) -> int:
        """Devices that see different samples."""
        return data_parallel_size(self.trainer)

    def averages(self) -> FollowingAverages:
        """Return the moving averages whose decays follow the batch."""
        try:
            return FollowingAverages(self.trainer.callbacks, self.owner.ema_rule, self.owner)  # type: ignore[attr-defined]
        except ValueError as error:
            raise MisconfigurationException(f"BatchSizeSchedule: {error}") from None

    def make(self) -> None:
        """Measure the data, once; :class:`DataNotReady` if the module's are not there yet."""
        if self._made:
            return
        trainer, owner = self.trainer, self.owner
        self.loader = loader = training_loader(trainer)
        replicas = self.replicas
        try:
            self.data = pass_over_data(trainer, loader)
        except MisconfigurationException:
            self.data = None
        can = self.data is not None and is_schedulable(loader)
        if owner.by == "loader" and not can:
            raise MisconfigurationException(
                f'BatchSizeSchedule: by="loader" needs a DataLoader with a map-style dataset and a torch BatchSampler, '
                f'and this is {type(loader).__name__}. Pass by="accumulation".'
            )
        self.by_loader = can and owner.by != "accumulation"
        if not self.by_loader:
            self.device_batch = loader_batch_size(loader)
        elif trainer.accumulate_grad_batches > 1 and self.most is None:
            self.most = loader_batch_size(loader)
        base = owner.reference_batch_size
        if base is None and isinstance(self.schedule, BatchSteps):
            base = self.schedule.batches[0]
        if base is None:
            base = loader_batch_size(loader) * trainer.accumulate_grad_batches * replicas
        samples = None if self.data is None else self.data.samples
        if samples is not None and self.data is not None and self.data.drop_last:
            samples = samples // base * base
        if samples is not None and base > samples:
            raise MisconfigurationException(
                f"BatchSizeSchedule: the reference run's batch {base} is more than the {samples} samples of an epoch. "
                "Lower reference_batch_size, or the loader's batch_size."
            )
        if not self.by_loader and self.device_batch * replicas > base:
            raise MisconfigurationException(
                f"BatchSizeSchedule grows the batch by accumulation here, in multiples of the loader's "
                f"{self.device_batch} x {replicas} replica(s), which is more than the reference run's batch {base}. "
                "Lower the loader's batch_size, or use a DataLoader with a map-style dataset."
            )
        self.clock = PassClock(samples, base)
        self.last, self.end = self._reference_end()
        self._made = True

    def _reference_end(self) -> tuple[int | None, tuple[int, int] | None]:
        epochs, steps = self.trainer.fit_loop.max_epochs, self.max_steps
        ends = [] if steps == -1 else [steps]
        if epochs not in (None, -1) and self.clock.samples is not None:
            ends.append(epochs * self.clock.updates_per_pass)
        return (min(ends), self.clock.place(min(ends))) if ends else (None, None)

    def lengths(self) -> dict[str, Any]:
        """Return what the trainer answers as in the reference run, where epochs have a known length."""
        self.make()
        if self.clock.samples is None:
            return {}
        return {
            "max_epochs": self.trainer.fit_loop.max_epochs,
            "max_steps": self.max_steps,
            "num_training_batches": self.clock.updates_per_pass,
            "accumulate_grad_batches": 1,
            "estimated_stepping_batches": math.inf if self.last is None else self.last,
        }

    def batch_at(self, samples: int) -> int:
        """Return the batch of the update that begins after so many samples, over all devices."""
        owner, batch = self.owner, self.schedule.batch_at(samples)
        most = min(owner.max_batch_size or math.inf, self.clock.samples or math.inf)
        if self.schedule.needs_rates and owner.max_batch_size is None:
            most = min(most, MOST_GROWTH * self.clock.batch_size)
        if not self.by_loader:
            unit = self.device_batch * self.replicas
            return max(1, math.floor(min(batch, max(most, unit)) / unit + 0.5)) * unit
        if batch < most and self.schedule.rounds:
            unit = owner.multiple_of or max(1, self.clock.batch_size // 8)
            batch = max(1, math.floor(batch / unit + 0.5)) * unit
        batch = max(1, int(min(batch, most)))
        if self.schedule.adaptive and self.most is not None:
            unit = self.replicas * math.ceil(batch / (self.most * self.replicas))
            batch = max(unit, batch // unit * unit)  # parts of one size, by which a noise scale can be measured
        return batch

    def updates(
        self, place: tuple[int, int], batch_at: Callable[[int], int] | None = None
    ) -> Iterator[tuple[int, int, int]]:
        """Yield the updates of a pass from a place on, as :func:`updates_of_pass`."""
        epoch, position = place
        end = self.end[1] if self.end is not None and self.end[0] == epoch else None
        return updates_of_pass(self.clock, batch_at or self.batch_at, epoch, position, end)

    def check_maximum(self) -> None:
        """Refuse a maximum that is less than the reference run's batch."""
        if self.owner.max_batch_size is not None and self.owner.max_batch_size < self.clock.batch_size:
            raise MisconfigurationException(
                f"BatchSizeSchedule: max_batch_size={self.owner.max_batch_size} is less than the reference run's batch "
                f"{self.clock.batch_size}. Raise it, or pass reference_batch_size=."
            )
