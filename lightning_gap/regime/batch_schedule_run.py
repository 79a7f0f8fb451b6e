"""One fit whose batch changes: where it is, what comes next, and what it has taken from the trainer."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_gap.regime.answers import ReferenceAnswers, length_holder
from lightning_gap.regime.batch_schedule import BatchSteps
from lightning_gap.regime.clock import Interval, ReferenceClock
from lightning_gap.regime.counters import NEVER
from lightning_gap.regime.fit import Fit
from lightning_gap.regime.held_scaling import HeldScaling
from lightning_gap.regime.loader import (
    DataNotReady,
    Pass,
    loader_batch_size,
    pass_over_data,
    same_data,
    training_loader,
)
from lightning_gap.regime.parts import Part, PassClock, parts_of_update, updates_of_pass
from lightning_gap.regime.rollout import Rollout, roll_out
from lightning_gap.regime.scheduled_loader import ScheduledLoader, draws_of, is_schedulable
from lightning_gap.regime.takeover import stepping_of
from lightning_gap.trainer.internals.of_lightning import count_batches, replace_training_source, take_accumulation
from lightning_gap.trainer.strategy import data_parallel_rank, data_parallel_size, from_rank_zero

if TYPE_CHECKING:
    from lightning_gap.regime.batch_schedule_callback import BatchSizeSchedule

__all__ = ["ScheduledRun"]


class ScheduledRun:
    """What :class:`BatchSizeSchedule` does in one fit."""

    def __init__(self, owner: "BatchSizeSchedule", trainer: Trainer, pl_module: LightningModule) -> None:
        self.owner, self.trainer, self.module = owner, trainer, pl_module
        self.schedule = owner.schedule
        self.loader: Any = None
        self.data: Pass | None = None
        self.by_loader = False
        self.clock = PassClock(None, 1)
        self.epoch = self.position = 0  # passes that are over, and samples of the next, up to the last update
        self.part: Part | None = None  # of the present batch
        self.closed = True  # whether an update was made after the latest batch
        self.ratio = 1.0
        self.seed = 0
        self.held: HeldScaling | None = None
        self.clocks: list[ReferenceClock] = []
        self.end: tuple[int, int] | None = None  # the place at which the reference run ends
        self.last: int | None = None  # its updates by then
        self.over = False
        self._planned = False
        self._device_batch = 1  # of the loader, where the batch grows by accumulation
        self._fresh = True  # whether the next batch is the first of those of a pass that are still to come
        self._max_steps = trainer.fit_loop.epoch_loop.max_steps
        self._answers: ReferenceAnswers | None = None
        self._source: Any = None
        self._give_back: Callable[[], None] | None = None
        self._saved: dict[str, Any] | None = None

    # ------------------------------------------------------------------ plan

    def set_up(self) -> None:
        """Let the trainer answer as in the reference run until its schedulers are made, and load our batches."""
        holder = length_holder(None)
        try:
            self.plan()
            holder = length_holder(self.loader)
        except DataNotReady:
            pass  # the module makes its data in its own setup
        self._source = replace_training_source(self.trainer, None)
        replace_training_source(self.trainer, _Source(self._source, self._scheduled))
        self._answers = ReferenceAnswers(self.trainer, self._lengths, lambda loader: same_data(loader, self.loader))
        self._answers.begin(self.module, holder, before=self.plan, after=lambda: None)

    def plan(self) -> None:
        """Measure the data, once, and decide by what the batch changes."""
        if self._planned:
            return
        trainer, owner = self.trainer, self.owner
        self.loader = loader = training_loader(trainer)
        replicas = data_parallel_size(trainer)
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
            self._device_batch = loader_batch_size(loader)
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
        if not self.by_loader and self._device_batch * replicas > base:
            raise MisconfigurationException(
                f"BatchSizeSchedule grows the batch by accumulation here, in multiples of the loader's "
                f"{self._device_batch} x {replicas} replica(s), which is more than the reference run's batch {base}. "
                "Lower the loader's batch_size, or use a DataLoader with a map-style dataset."
            )
        self.clock = PassClock(samples, base)
        self.last, self.end = self._reference_end()
        self._planned = True

    def _reference_end(self) -> tuple[int | None, tuple[int, int] | None]:
        epochs, steps = self.trainer.fit_loop.max_epochs, self._max_steps
        ends = [] if steps == -1 else [steps]
        if epochs not in (None, -1) and self.clock.samples is not None:
            ends.append(cast(int, epochs) * self.clock.updates_per_pass)
        return (min(ends), self.clock.place(min(ends))) if ends else (None, None)

    def _lengths(self) -> dict[str, Any]:
        self.plan()
        if self.clock.samples is None:
            return {}
        return {
            "max_epochs": self.trainer.fit_loop.max_epochs,
            "max_steps": self._max_steps,
            "num_training_batches": self.clock.updates_per_pass,
            "accumulate_grad_batches": 1,
            "estimated_stepping_batches": math.inf if self.last is None else self.last,
        }

    def _scheduled(self, loader: Any) -> Any:
        """Return what is loaded in the place of the user's loader."""
        self.plan()
        if not self.by_loader:
            return loader
        self.seed = from_rank_zero(self.trainer, self._saved["seed"] if self._saved else torch.initial_seed() % 2**62)
        length = None if self.schedule.adaptive else self.batches_of_pass
        self.loader = ScheduledLoader(loader, draws_of(loader, seed=self.seed), self.parts, length)
        return self.loader

    # ----------------------------------------------------------------- batch

    def batch_at(self, samples: int) -> int:
        """Return the batch of the update that begins after so many samples, over all devices."""
        owner, batch = self.owner, self.schedule.batch_at(samples)
        most = min(owner.max_batch_size or math.inf, self.clock.samples or math.inf)
        if not self.by_loader:
            unit = self._device_batch * data_parallel_size(self.trainer)
            return max(1, math.floor(min(batch, max(most, unit)) / unit + 0.5)) * unit
        if batch < most and self.schedule.rounds:
            unit = owner.multiple_of or max(1, self.clock.batch_size // 8)
            batch = max(1, math.floor(batch / unit + 0.5)) * unit
        return max(1, int(min(batch, most)))

    @property
    def seen(self) -> int:
        """Samples seen up to the last update."""
        return self.clock.seen(self.epoch, self.position)

    def _next_place(self) -> tuple[int, int]:
        over = self.clock.samples is not None and self.position >= self.clock.samples
        return (self.epoch + 1, 0) if over else (self.epoch, self.position)

    def updates(self, place: tuple[int, int]) -> Iterator[tuple[int, int, int]]:
        """Yield the updates of a pass from a place on, as :func:`updates_of_pass`."""
        epoch, position = place
        end = self.end[1] if self.end is not None and self.end[0] == epoch else None
        return updates_of_pass(self.clock, self.batch_at, epoch, position, end)

    def parts(self, ranks: int | None = None) -> Iterator[Part]:
        """Yield this process's parts of what is still to come of the pass."""
        place = self._next_place()
        rank = data_parallel_rank(self.trainer)
        ranks = data_parallel_size(self.trainer)
        most = self.owner.max_device_batch_size
        for begins, ends, batch in self.updates(place):
            yield from parts_of_update(begins, ends, batch, epoch=place[0], rank=rank, ranks=ranks, most=most)

    def batches_of_pass(self, begun: int = 0) -> int:
        """Return how many batches of a device the pass has, with those that are over by the trainer's count.

        That count holds ``begun`` batches that are not over.
        """
        place = self._next_place()
        ready = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready - begun if place[1] else 0
        ranks, most = data_parallel_size(self.trainer), self.owner.max_device_batch_size
        parts = (1 if most is None else math.ceil((e - b) / (most * ranks)) for b, e, _ in self.updates(place))
        # A run that is over has none, and Lightning takes a loader without batches for a mistake.
        return max(1, ready + sum(parts))

    # ---------------------------------------------------------------- change

    def take_over(self, scaled_at: Callable[..., Any]) -> list[tuple[ReferenceClock, Rollout]]:
        """Take the schedulers' clocks, the accumulation and the hyperparameters; return the schedules rolled out."""
        self.plan()
        reference = None
        if self._answers is not None:
            self._answers.end()
            reference = self._answers.at if self.clock.samples is not None else None
        fit = Fit.of(self.trainer, self.module)
        stepping = stepping_of(self.module, reference)
        rolled: list[tuple[ReferenceClock, Rollout]] = []
        taken = []
        for config in fit.configs:
            by_epoch = config.interval == "epoch"
            if config.reduce_on_plateau or isinstance(config.scheduler, ReduceLROnPlateau):
                if self.schedule.needs_rates:
                    raise MisconfigurationException(
                        'BatchSizeSchedule("seesaw") follows a scheduler that is known beforehand, and '
                        f"{type(config.scheduler).__name__} looks at a metric. Use "
                        f'PlateauBatches(monitor="{config.monitor}") in its place.'
                    )
                continue
            if by_epoch and self.clock.samples is None:
                continue  # Lightning knows when an epoch is over
            interval: Interval = "epoch" if by_epoch else "step"
            clock = ReferenceClock(
                config.scheduler,
                interval,
                config.frequency,
                self.clock.updates_per_pass,
                Fraction(1),
                self.last,
                stepping,
            )
            seen = roll_out(clock) if self.last is not None else Rollout([], None, whole=False)
            if seen.error is not None:
                raise MisconfigurationException(
                    f"BatchSizeSchedule: {type(config.scheduler).__name__} fails within the reference run's "
                    f"{self.last} updates at the batch {self.clock.batch_size}: {seen.error}"
                )
            rolled.append((clock, seen))
            taken.append(config)
        self.schedule.begin(self.clock.batch_size, self._rates(rolled) if self.schedule.needs_rates else None)
        self._check_first_batch()
        # All is known to go: now the trainer's things are taken.
        for config in taken:
            config.interval, config.frequency = "step", NEVER
        self.clocks = sorted((clock for clock, _ in rolled), key=lambda clock: clock.interval == "epoch")
        self.held = HeldScaling(fit.optimizers, scaled_at)
        self._give_back = take_accumulation(self.trainer, self._opens, self._closes)
        self.trainer.fit_loop.epoch_loop.max_steps = -1
        return rolled

    def _rates(self, rolled: list[tuple[ReferenceClock, Rollout]]) -> Callable[[int], tuple[float, float]]:
        if len(rolled) != 1 or not rolled[0][1].whole or self.clock.samples is None:
            raise MisconfigurationException(
                'BatchSizeSchedule("seesaw") follows one scheduler over a reference run of known length, and there '
                f"are {len(rolled)} that can be rolled out. Return one from configure_optimizers, set max_epochs or "
                "max_steps, or give the batches as steps."
            )
        clock, seen = rolled[0]
        highest, most = [], 0.0
        for rate in seen.rates:
            most = max(most, rate)
            highest.append(most)

        def rate_at(samples: int) -> tuple[float, float]:
            epoch, position = divmod(samples, cast(int, self.clock.samples))
            step = clock.steps_until(min(self.clock.update(epoch, position), cast(int, self.last)))
            step = min(step, len(highest) - 1)
            return seen.rates[step], highest[step]

        return rate_at

    def _check_first_batch(self) -> None:
        if self.owner.max_batch_size is not None and self.owner.max_batch_size < self.clock.batch_size:
            raise MisconfigurationException(
                f"BatchSizeSchedule: max_batch_size={self.owner.max_batch_size} is less than the reference run's batch "
                f"{self.clock.batch_size}. Raise it, or pass reference_batch_size=."
            )

    def _opens(self) -> bool:
        return self.part is None or self.part.opens

    def _closes(self) -> bool:
        return self.closed

    def start(self) -> None:
        """Take up what a checkpoint left, once the optimizers have theirs."""
        assert self.held is not None
        saved, self._saved = self._saved, None
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        if saved is not None:
            self.held.load_state_dict(saved["reference"], saved["ratio"])
            self.ratio = saved["ratio"]
            at_end = self.clock.samples is not None and self.position >= self.clock.samples
            if at_end and self.by_loader:
                # By these counts Lightning knows that the pass is over, and whether it was validated.
                count_batches(self.trainer, progress.current.ready)
        if not self.schedule.adaptive:
            self.held.put(self.batch_at(self.seen) / self.clock.batch_size)
        self._end_if_over(self.clock.update(self.epoch, self.position))

    def _end_if_over(self, update: int) -> None:
        if self.last is not None and update >= self.last and self._max_steps != -1:
            self.trainer.fit_loop.epoch_loop.max_steps = self.trainer.global_step

    # ----------------------------------------------------------------- train

    def start_epoch(self) -> None:
        """Leave the rest of a pass that was broken off."""
        if self.position and self.clock.samples is not None:
            self.position = self.clock.samples
        self._fresh = True

    def start_batch(self) -> Part:
        """Say what the present batch is, and make the optimizer that of its update."""
        part = self.loader.coming.popleft() if self.by_loader else self._accumulated()
        if self._fresh and self.by_loader:
            count_batches(self.trainer, math.inf if self.schedule.adaptive else self.batches_of_pass(begun=1))
        self._fresh = False
        self.part, self.closed = part, part.closes
        self.trainer.accumulate_grad_batches = part.parts
        if part.opens:
            assert self.held is not None
            self.ratio = part.batch_size / self.clock.batch_size
            self.held.put(self.ratio)
        return part

    def _accumulated(self) -> Part:
        """Return the part of an update that the present batch of the user's loader is."""
        unit = self._device_batch * data_parallel_size(self.trainer)
        before = self.part
        if before is not None and not before.closes:
            last = self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
            number = before.parts - 1 if last else before.number + 1
            return replace(before, first=before.first + before.size, number=number)
        epoch, position = self._next_place()
        batch = self.batch_at(self.clock.seen(epoch, position))
        ends = position + batch if self.clock.samples is None else min(position + batch, self.clock.samples)
        parts = math.ceil((ends - position) / unit)
        return Part(position, unit, 1.0, 0, parts, epoch, position, ends, batch)

    def end_batch(self) -> bool:
        """Step the schedulers that the reference run steps meanwhile; return whether an update was made."""
        part, held = self.part, self.held
        assert part is not None and held is not None
        last = self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if not (part.closes or last):
            return False
        before = self.clock.update(self.epoch, self.position)
        ends = part.ends
        if last and not self.by_loader and self.clock.samples is not None and self.end != (part.epoch, part.ends):
            ends = self.clock.samples
        self.epoch, self.position = part.epoch, ends
        now = self.clock.update(self.epoch, self.position)
        if self.last is not None:
            now = min(now, self.last)
        self._step_schedulers(before, now)
        if not self.schedule.adaptive:
            held.put(self.batch_at(self.seen) / self.clock.batch_size)
        self._end_if_over(now)
        return True

    def _step_schedulers(self, before: int, now: int) -> None:
        assert self.held is not None
        due = [(clock, clock.steps_until(before), clock.steps_until(now)) for clock in self.clocks]
        if all(first == last for _, first, last in due):
            return
        with self.held.reference_run():
            for clock, first, last in due:
                for step in range(first + 1, last + 1):
                    clock.step_after(clock.reference_update_of(step))

    def observe(self, metrics: dict[str, Any]) -> None:
        """Let an adaptive schedule see what has been measured. Collective."""
        try:
            self.schedule.observe(metrics)
        except ValueError as error:
            raise MisconfigurationException(f"BatchSizeSchedule: {error}") from None
        self._share()

    def observe_noise(self, noise_scale: float) -> None:
        """Let an adaptive schedule see the noise scale. Collective."""
        self.schedule.observe_noise(noise_scale)
        self._share()

    def _share(self) -> None:
        with nullcontext() if data_parallel_size(self.trainer) == 1 else torch.no_grad():
            self.schedule.load_state_dict(from_rank_zero(self.trainer, self.schedule.state_dict()))

    # ---------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """Return where the run is, as plain Python."""
        return {
            "schedule": self.schedule.name,
            "reference_batch_size": self.clock.batch_size,
            "learnt": self.schedule.state_dict(),
            "epoch": self.epoch,
            "position": self.position,
            "closed": self.closed,
            "ratio": self.ratio,
            "seed": self.seed,
            "reference": [] if self.held is None else self.held.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint was written."""
        self.plan()
        here = {"schedule": self.schedule.name, "reference_batch_size": self.clock.batch_size}
        other = [f"{key}={state[key]!r} and not {value!r}" for key, value in here.items() if state[key] != value]
        if other:
            raise MisconfigurationException(
                f"The checkpoint is of another BatchSizeSchedule: {'; '.join(other)}. Resume with the same arguments, "
                "or start a new run from its weights."
            )
        if not state["reference"]:
            return  # written before training
        self.schedule.begin(self.clock.batch_size) if self.schedule.adaptive else None
        self.schedule.load_state_dict(state["learnt"])
        self.epoch, self.position, self.closed = state["epoch"], state["position"], state["closed"]
        self.seed, self._saved = state["seed"], state

    def release(self) -> None:
        """Give everything back that is the user's."""
        if self.over:
            return
        self.over = True
        if self._answers is not None:
            self._answers.end()
        if self._source is not None:
            replace_training_source(self.trainer, self._source)
        if self._give_back is not None:
            self._give_back()
        self.trainer.fit_loop.epoch_loop.max_steps = self._max_steps
        if self.held is not None:
            self.held.give_back()


class _Source:
    """Where a trainer gets its training loader from, with what is made of it."""

    def __init__(self, source: Any, made_of: Callable[[Any], Any]) -> None:
        self._source, self._made_of = source, made_of

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def dataloader(self) -> Any:
        """Return the loader."""
        return self._made_of(self._source.dataloader())
