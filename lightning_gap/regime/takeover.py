"""What a regime takes out of Lightning's hands when a fit starts, and gives back when it is over."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from torch.optim import Optimizer

from lightning_gap.regime.applied import clock_of
from lightning_gap.regime.clock import Interval, ReferenceClock, RegimeClock, Stepping
from lightning_gap.regime.counters import (
    NEVER,
    EpochCounter,
    ValidationClock,
    epoch_counters,
    patience,
    validates_within_epochs,
    warn_of_other_counters,
)
from lightning_gap.regime.fates import Fate, SchedulerFate
from lightning_gap.regime.plan import RegimePlan
from lightning_gap.regime.plateaus import ReferencePlateaus
from lightning_gap.regime.sample_noise import SampleNoise
from lightning_gap.regime.warmup import Warmup
from lightning_gap.trainer.strategy import data_parallel_rank, from_rank_zero

__all__ = ["Taken", "learning_rates", "refused_as", "take_schedulers", "validation_clock"]


@dataclass
class Taken:
    """What a run steps and counts by itself from ``on_fit_start`` on.

    Attributes:
        clock: Steps the schedulers, and has the warm-ups.
        validations: Validates within epochs.
        groups: How many parameter groups each optimizer has.
        counters: What else happens in some epochs.
        noise: Weights samples.
    """

    clock: RegimeClock
    validations: ValidationClock | None
    groups: list[int]
    counters: list[EpochCounter] = field(default_factory=list)
    noise: SampleNoise | None = None

    def weigh_samples(self, trainer: Trainer, module: nn.Module, variance: float) -> None:
        """Weight the samples at random from now on. Collective."""
        seed = from_rank_zero(trainer, torch.initial_seed())
        self.noise = SampleNoise(module, variance, seed=seed, rank=data_parallel_rank(trainer))

    def take_counters(self, trainer: Trainer, plan: RegimePlan) -> tuple[str, ...]:
        """Take over what counts epochs beside schedulers, and return a line for each."""
        if plan.reclocked:
            if plan.stretch != 1:
                self.counters = list(epoch_counters(trainer))
                warn_of_other_counters(trainer, plan)
            if self.validations is not None:
                self.validations.lift()
        within = [] if self.validations is None else [self.validations.fate]
        counted = [counter.fate(plan) for counter in self.counters]
        return (*counted, *within, *patience(trainer, plan, self.validations))

    def set_counters(self, plan: RegimePlan, start: int) -> None:
        """Say what happens at the end of an epoch of this run."""
        if self.counters:
            end = start + cast(int, plan.updates_per_epoch)
            end = end if plan.updates is None else min(end, plan.updates)
            for counter in self.counters:
                counter.set(plan, start, end)

    def warmup_of(self, trainer: Trainer, optimizer: Optimizer) -> Warmup:
        """Return what warms an optimizer up."""
        return next(w for o, w in zip(trainer.optimizers, self.clock.warmups, strict=True) if o is optimizer)

    def watch_groups(self, trainer: Trainer) -> None:
        """Warn of parameter groups that are added with a learning rate of their own."""
        sizes = [len(optimizer.param_groups) for optimizer in trainer.optimizers]
        if sizes == self.groups:
            return
        for optimizer, size, before in zip(trainer.optimizers, sizes, self.groups, strict=True):
            if size > before and (rate := optimizer.param_groups[-1]["lr"]) != optimizer.defaults["lr"]:
                rank_zero_warn(
                    f"LargeBatchRegime: a parameter group was added with the learning rate {float(rate):g}, which is "
                    "taken as it is. A group without a rate of its own gets the optimizer's, which is scaled."
                )
        self.groups = sizes

    def give_back(self) -> None:
        """Give everything back that is the user's."""
        for counter in self.counters:
            counter.put(counter.users)
        self.counters = []
        if self.validations is not None:
            self.validations.give_back()
            self.validations = None
        for warmup in self.clock.warmups:
            warmup.remove()
        if self.noise is not None:
            self.noise.remove()


def refused_as(make: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Return what a function returns; what it refuses by a ``ValueError`` is refused in the words of Lightning.

    Raises:
        MisconfigurationException: If it refuses.
    """
    try:
        return make(*args, **options)
    except ValueError as error:
        raise MisconfigurationException(f"LargeBatchRegime: {error}") from None


def validation_clock(trainer: Trainer, plan: RegimePlan) -> ValidationClock | None:
    """Return what validates within epochs, if the reference run does and its epochs have another length.

    Raises:
        MisconfigurationException: If the interval is longer than a reference epoch.
    """
    if not (plan.reclocked and validates_within_epochs(trainer)):
        return None
    return cast(ValidationClock, refused_as(ValidationClock, trainer, plan))


def learning_rates(trainer: Trainer) -> list[float]:
    """Return the learning rates of all groups; some optimizers find their own."""
    rates = [group.get("lr") for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return [float(rate) for rate in rates if rate is not None]


def take_schedulers(
    trainer: Trainer, plan: RegimePlan, plateaus: ReferencePlateaus, stepping: Stepping, *, stretch: str | bool
) -> tuple[list[ReferenceClock], tuple[SchedulerFate, ...]]:
    """Take the schedulers out of Lightning's hands whose lengths are the reference run's.

    They stay in Lightning's lists, so they are saved, restored and monitored.

    Args:
        trainer: The trainer.
        plan: The plan of the run.
        plateaus: Takes those that look at a metric.
        stepping: How the others are stepped.
        stretch: The argument ``stretch_schedulers``.

    Returns:
        The clocks of those that are taken over, and what becomes of each of all.
    """
    clocks, fates = [], []
    for config in trainer.lr_scheduler_configs:
        fate, every = _fate(config, plan, stretch)
        told = type(config.scheduler).__name__, fate, config.interval, config.frequency, every
        fates.append(SchedulerFate(*told))
        if fate is Fate.AT_EPOCH_END:
            plateaus.take(config)
        elif fate not in (Fate.AS_IT_WAS, Fate.THIS_RUNS):
            interval: Interval = "epoch" if config.interval == "epoch" else "step"
            clocks.append(clock_of(plan, config.scheduler, interval, config.frequency, stepping))
            # A frequency that no epoch has as many batches as: Lightning itself never steps the scheduler.
            config.interval, config.frequency = "step", NEVER
    return clocks, tuple(fates)


def _fate(config: LRSchedulerConfig, plan: RegimePlan, stretch: str | bool) -> tuple[Fate, float]:
    by_epoch = config.interval == "epoch"
    if not plan.reclocked:
        return Fate.AS_IT_WAS, 0.0
    if not stretch:
        return Fate.THIS_RUNS, 0.0
    if config.reduce_on_plateau:
        return (Fate.AT_EPOCH_END if by_epoch and plan.stretch != 1 else Fate.AS_IT_WAS), 0.0
    if by_epoch:
        return Fate.BY_EPOCHS, float(config.frequency * cast(Any, plan.stretched_epoch))
    if plan.pace == 1:
        return Fate.BY_UPDATES, 0.0
    return Fate.BY_PACE, float(plan.pace / config.frequency)
