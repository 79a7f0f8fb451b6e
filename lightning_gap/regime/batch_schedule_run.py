"""One fit whose batch changes: where it is, what comes next, and what it has taken from the trainer."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_gap.regime.answers import ReferenceAnswers, length_holder
from lightning_gap.regime.batch_schedule_plan import SchedulePlan
from lightning_gap.regime.clock import ReferenceClock
from lightning_gap.regime.counters import NEVER
from lightning_gap.regime.fit import Fit
from lightning_gap.regime.held_scaling import HeldScaling, ScaledAt, warn_of_others
from lightning_gap.regime.loader import DataNotReady, same_data
from lightning_gap.regime.parts import Part, PassClock, parts_of_update
from lightning_gap.regime.reference_schedulers import RolledOut, rates_by_samples, reference_schedulers
from lightning_gap.regime.rules.factor import rule_name
from lightning_gap.regime.scheduled_loader import ScheduledLoader, ScheduledSource, draws_of, worker_seeds
from lightning_gap.regime.takeover import stepping_of
from lightning_gap.regime.weight_averages import FollowingAverages
from lightning_gap.trainer.internals.of_lightning import count_batches, replace_training_source, take_accumulation
from lightning_gap.trainer.strategy import data_parallel_rank, from_rank_zero

if TYPE_CHECKING:
    from lightning_gap.regime.batch_schedule_callback import BatchSizeSchedule

__all__ = ["ScheduledRun"]


class ScheduledRun:
    """What :class:`BatchSizeSchedule` does in one fit."""

    def __init__(self, owner: "BatchSizeSchedule", trainer: Trainer, pl_module: LightningModule) -> None:
        self.owner, self.trainer, self.module, self.schedule = owner, trainer, pl_module, owner.schedule
        self.plan = SchedulePlan(owner, trainer)
        # Passes that are over, and samples of the next, up to the last update.
        self.epoch, self.position = trainer.current_epoch, 0
        self.part: Part | None = None  # of the present batch
        self.closed = True  # whether an update was made after the latest batch
        self.ratio = 1.0
        self.seed = 0
        self.held: HeldScaling | None = None
        self.averages: FollowingAverages | None = None
        self.over = False
        self._clocks: list[ReferenceClock] = []
        self._fresh = True  # whether the next batch is the first of those of a pass that are still to come
        self._answers: ReferenceAnswers | None = None
        self._source: Any = None
        self._give_back: Callable[[], None] | None = None
        self._saved: dict[str, Any] | None = None
        self._within = False  # whether a checkpoint was written within the first update of a pass
        self._left: tuple[tuple[int, int], int] | None = None  # batches of a device from a place to the end of its pass
        self._pending: list[int] = []  # batches that had been drawn when a checkpoint was written

    # ------------------------------------------------------------------ plan

    def set_up(self) -> None:
        """Let the trainer answer as in the reference run until its schedulers are made, and load our batches."""
        holder = length_holder(None)
        try:
            self.plan.make()
            holder = length_holder(self.plan.loader)
        except DataNotReady:
            pass  # the module makes its data in its own setup
        self._source = replace_training_source(self.trainer, None)
        replace_training_source(self.trainer, ScheduledSource(self._source, self._scheduled))
        self._answers = ReferenceAnswers(
            self.trainer, self.plan.lengths, lambda loader: same_data(loader, self.plan.loader)
        )
        self._answers.begin(self.module, holder, before=self.plan.make, after=lambda: None)

    def _scheduled(self, loader: Any) -> Any:
        """Return what is loaded in the place of the user's loader."""
        self.plan.make()
        if not self.plan.by_loader:
            return loader
        own = self._saved["seed"] if self._saved else torch.initial_seed() % 2**40
        self.seed = from_rank_zero(self.trainer, own)
        rank = self.trainer.global_rank
        self.plan.loader = ours = ScheduledLoader(
            self.plan.loader,
            draws_of(self.plan.loader, seed=self.seed),
            self.parts,
            None if self.schedule.adaptive else self.batches_of_pass,
            seed=self.seed + 7919 * (1 + rank),
            worker_init=worker_seeds(rank),
        )
        if not isinstance(loader, (CombinedLoader, Mapping, list, tuple)):
            return ours
        combined = loader if isinstance(loader, CombinedLoader) else CombinedLoader(loader, "max_size_cycle")
        combined.flattened = [ours]  # the one that there is
        return combined

    # ----------------------------------------------------------------- batch

    @property
    def clock(self) -> PassClock:
        """Where the reference run is after so many samples."""
        return self.plan.clock

    @property
    def seen(self) -> int:
        """Samples seen up to the last update."""
        return self.clock.seen(self.epoch, self.position)

    def _next_place(self) -> tuple[int, int]:
        over = self.clock.samples is not None and self.position >= self.clock.samples
        return (self.epoch + 1, 0) if over else (self.epoch, self.position)

    def parts(self) -> Iterator[Part]:
        """Yield this process's parts of what is still to come of the pass."""
        place, pending = self._next_place(), list(self._pending)
        self._pending = []
        rank, ranks, most = data_parallel_rank(self.trainer), self.plan.replicas, self.plan.most

        def batch_at(samples: int) -> int:
            return pending.pop(0) if pending else self.plan.batch_at(samples)

        for begins, ends, batch in self.plan.updates(place, batch_at):
            yield from parts_of_update(begins, ends, batch, epoch=place[0], rank=rank, ranks=ranks, most=most)

    def batches_of_pass(self, begun: int = 0) -> int:
        """Return how many batches of a device the pass has, with those that are over by the trainer's count.

        That count holds ``begun`` batches that are not over.
        """
        place = self._next_place()
        within = place[1] or self._within
        ready: int = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready - begun if within else 0
        if self._left is None or self._left[0] != place:  # asked for twice, and counted by going through the pass
            ranks, most = self.plan.replicas, self.plan.most
            parts = (1 if most is None else math.ceil((e - b) / (most * ranks)) for b, e, _ in self.plan.updates(place))
            self._left = place, sum(parts)
        # A run that is over has none, and Lightning takes a loader without batches for a mistake.
        return max(1, ready + self._left[1])

    # ---------------------------------------------------------------- change

    def take_over(self, scaled_at: ScaledAt) -> list[RolledOut]:
        """Take the schedulers' clocks, the accumulation and the hyperparameters; return the schedules rolled out."""
        self.plan.make()
        reference = None
        if self._answers is not None:
            self._answers.end()
            reference = self._answers.at if self.clock.samples is not None else None
        fit, plan = Fit.of(self.trainer, self.module), self.plan
        follow = self.schedule.needs_rates
        rolled = reference_schedulers(fit, plan.clock, plan.last, stepping_of(self.module, reference), follow=follow)
        rate_at = rates_by_samples(rolled, plan.clock, plan.last) if follow else None
        self.schedule.begin(plan.clock.batch_size, rate_at)
        self._left = None  # of before the batches were known
        if self._saved is not None:
            self.schedule.load_state_dict(self._saved["learnt"])
        plan.check_maximum()
        self.averages = self.plan.averages()
        # All is known to go: now the trainer's things are taken.
        for config, *_ in rolled:
            config.interval, config.frequency = "step", NEVER
        self._clocks = sorted((clock for _, clock, _ in rolled), key=lambda clock: clock.interval == "epoch")
        plateau = any(config.reduce_on_plateau for config in fit.configs)
        self.held = HeldScaling(fit.optimizers, scaled_at, lambda key: None if plateau else warn_of_others(key))
        self._give_back = take_accumulation(self.trainer, self._opens, self._closes)
        loop = self.trainer.fit_loop.epoch_loop
        loop.max_steps = -1
        if loop.min_steps:
            loop.min_steps = NEVER  # until the reference run has made them
        return rolled

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
            if at_end and self.plan.by_loader:
                # By these counts Lightning knows that the pass is over, and whether it was validated.
                count_batches(self.trainer, progress.current.ready)
        if not self.schedule.adaptive:
            self.held.put(self.plan.batch_at(self.seen) / self.clock.batch_size)
        self._end_if_over(self.clock.update(self.epoch, self.position))

    def _end_if_over(self, update: int) -> None:
        if self.plan.min_steps and update >= self.plan.min_steps:
            self.trainer.fit_loop.epoch_loop.min_steps = None
        if self.plan.last is not None and update >= self.plan.last and self.plan.max_steps != -1:
            self.trainer.fit_loop.epoch_loop.max_steps = self.trainer.global_step

    # ----------------------------------------------------------------- train

    @property
    def rate(self) -> Any:
        """The learning rate of the first group, as it is now; ``None`` where there is none."""
        groups = self.trainer.optimizers[0].param_groups if self.trainer.optimizers else []
        rate = groups[0].get("lr") if groups else None
        return rate.clone() if isinstance(rate, torch.Tensor) else rate

    def end_epoch(self) -> None:
        """Leave the rest of a pass that was broken off, as Lightning does, and step what the end of one steps."""
        if self.position and self.clock.samples is not None and self.position < self.clock.samples:
            before = self.clock.update(self.epoch, self.position)
            self.position = self.clock.samples
            after = self.clock.update(self.epoch, self.position)
            if self.trainer.fit_loop.epoch_loop.max_steps == -1:  # and the run is not over
                self._step_schedulers(before, after)
        self._fresh = True
        if self.averages is not None:
            self.averages.give_back()

    def start_batch(self) -> Part:
        """Say what the present batch is, and make the optimizer that of its update."""
        part = self.plan.loader.take() if self.plan.by_loader else self._accumulated()
        if self._fresh and self.plan.by_loader:
            count_batches(self.trainer, math.inf if self.schedule.adaptive else self.batches_of_pass(begun=1))
        self._fresh = self._within = False
        self.part, self.closed = part, part.closes
        self.trainer.accumulate_grad_batches = part.parts
        if part.opens:
            assert self.held is not None
            # A last update that falls short of its batch is made at the rate of the samples that it has.
            self.ratio = min(part.batch_size, max(part.ends - part.begins, self.clock.batch_size))
            self.ratio /= self.clock.batch_size
            self.held.put(self.ratio)
        assert self.averages is not None
        self.averages.put(self.ratio)
        return part

    def _accumulated(self) -> Part:
        """Return the part of an update that the present batch of the user's loader is."""
        unit = self.plan.device_batch * self.plan.replicas
        before = self.part
        if before is not None and not before.closes:
            last = self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
            number = before.parts - 1 if last else before.number + 1
            return before._replace(first=before.first + unit, number=number)
        epoch, position = self._next_place()
        batch = self.plan.batch_at(self.clock.seen(epoch, position))
        ends = position + batch if self.clock.samples is None else min(position + batch, self.clock.samples)
        parts = math.ceil((ends - position) / unit)
        return Part(position, unit, 1.0, 0, parts, epoch, position, ends, batch)

    def end_batch(self) -> bool:
        """Step the schedulers that the reference run steps meanwhile; return whether an update was made."""
        part, held = self.part, self.held
        assert part is not None
        assert held is not None
        last = self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if not (part.closes or last):
            return False
        if self.averages is not None:
            self.averages.end_batch()
        before = self.clock.update(self.epoch, self.position)
        ends = part.ends
        if last and not self.plan.by_loader:  # the loader has ended within the update
            ends = part.first + part.size if self.clock.samples is None else min(ends, self.clock.samples)
        self.epoch, self.position = part.epoch, ends
        now = self.clock.update(self.epoch, self.position)
        if self.plan.last is not None:
            now = min(now, self.plan.last)
        self._step_schedulers(before, now)
        if not self.schedule.adaptive:
            held.put(self.plan.batch_at(self.seen) / self.clock.batch_size)
        self._end_if_over(now)
        return True

    def _step_schedulers(self, before: int, now: int) -> None:
        assert self.held is not None
        due = [(clock, clock.steps_until(before), clock.steps_until(now)) for clock in self._clocks]
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
        self.schedule.load_state_dict(from_rank_zero(self.trainer, self.schedule.state_dict()))

    # ---------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """Return where the run is, as plain Python."""
        return {
            **self._facts(),
            "learnt": self.schedule.state_dict(),
            "epoch": self.epoch,
            "position": self.position,
            "closed": self.closed,
            "ratio": self.ratio,
            "seed": self.seed,
            "pending": self._drawn(),
            "reference": [] if self.held is None else self.held.state_dict(),
        }

    def _facts(self) -> dict[str, Any]:
        """Return what a run that goes on must share."""
        owner = self.owner
        return {
            "schedule": self.schedule.name,
            "reference_batch_size": self.clock.batch_size,
            "samples": self.clock.samples,
            "max_batch_size": owner.max_batch_size,
            "rules": [rule_name(rule) for rule in (owner.lr_rule, owner.weight_decay_rule, owner.betas_rule)]
            + ([] if owner.momentum_rule == "none" else [f"momentum by {owner.momentum_rule}"]),
            "ema_rule": (self.averages or self.plan.averages()).name,
        }

    def _drawn(self) -> list[int]:
        """Return the batches of the updates that an adaptive schedule cannot change any more."""
        loader = self.plan.loader
        if not self.schedule.adaptive or not isinstance(loader, ScheduledLoader):
            return []
        now = [] if self.part is None or self.closed else [self.part.batch_size]
        return now + [part.batch_size for part in (*loader.coming, *loader.drawn) if part.opens]

    def load(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint was written."""
        self.plan.make()
        here, state = self._facts(), {"ema_rule": "none", **state}
        other = [f"{key}={state[key]!r} and not {value!r}" for key, value in here.items() if state[key] != value]
        if other:
            raise MisconfigurationException(
                f"The checkpoint is of another BatchSizeSchedule: {'; '.join(other)}. Resume with the same arguments, "
                "or start a new run from its weights."
            )
        if not state["reference"]:
            return  # written before training
        if not (self.plan.by_loader or state["closed"]):
            raise MisconfigurationException(
                "The checkpoint was written within an update, whose gradients are lost, and a loader that is "
                "accumulated does not go back. Resume from one that was written after an update."
            )
        if self.held is not None:  # some strategies restore a checkpoint only now
            self.schedule.load_state_dict(state["learnt"])
        self.epoch, self.position, self.closed = state["epoch"], state["position"], state["closed"]
        self.seed, self._saved, self._pending = state["seed"], state, state["pending"]
        self._within = not self.closed

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
        self.trainer.fit_loop.epoch_loop.max_steps = self.plan.max_steps
        self.trainer.fit_loop.epoch_loop.min_steps = self.plan.min_steps
        if self.held is not None:
            self.held.give_back()
        if self.averages is not None:
            self.averages.give_back()
