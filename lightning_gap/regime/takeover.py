"""What a regime takes out of Lightning's hands when a fit starts, and gives back when it is over."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from torch.optim import Optimizer

from lightning_gap.regime.clock import Fate, Interval, ReferenceClock, RegimeClock, SchedulerFate, Stepping
from lightning_gap.regime.counters import NEVER, EpochCounter, ValidationClock, epoch_counters, patience
from lightning_gap.regime.fit import Fit
from lightning_gap.regime.plan import RegimePlan
from lightning_gap.regime.sample_noise import SampleNoise
from lightning_gap.regime.warmup import Warmup
from lightning_gap.regime.weight_averages import WeightsAverage
from lightning_gap.trainer.strategy import data_parallel_rank, from_rank_zero

__all__ = ["ReferencePlateaus", "Taken", "stepping_of", "take_schedulers"]


@dataclass
class Taken:
    """What a run steps and counts by itself from ``on_fit_start`` on."""

    clock: RegimeClock
    validations: ValidationClock | None
    groups: list[int]  # how many each optimizer has
    counters: list[EpochCounter] = field(default_factory=list)
    noise: SampleNoise | None = None
    averages: list[WeightsAverage] = field(default_factory=list)

    def weigh_samples(self, trainer: Trainer, module: nn.Module, variance: float) -> None:
        """Weight the samples at random from now on. Collective."""
        seed = from_rank_zero(trainer, torch.initial_seed())
        self.noise = SampleNoise(module, variance, seed=seed, rank=data_parallel_rank(trainer))

    def take_counters(self, trainer: Trainer, fit: Fit, plan: RegimePlan) -> tuple[str, ...]:
        """Take over what counts epochs beside schedulers, and return a line for each."""
        if plan.reclocked:
            if plan.stretch != 1:
                self.counters = list(epoch_counters(trainer, fit))
            if self.validations is not None:
                self.validations.lift()
        within = [] if self.validations is None else [self.validations.fate]
        counted = [counter.fate(plan) for counter in self.counters]
        return (*counted, *within, *patience(fit, plan, self.validations))

    def set_counters(self, plan: RegimePlan, start: int) -> None:
        """Say what happens at the end of an epoch of this run."""
        if self.counters:
            end = start + cast(int, plan.updates_per_epoch)
            end = end if plan.updates is None else min(end, plan.updates)
            for counter in self.counters:
                counter.set(plan, start, end)

    def warmup_of(self, optimizer: Optimizer) -> Warmup:
        """Return what warms an optimizer up."""
        return next(warmup for warmup in self.clock.warmups if warmup.optimizer is optimizer)

    def watch_groups(self) -> None:
        """Warn of parameter groups that are added with a learning rate of their own."""
        for at, warmup in enumerate(self.clock.warmups):
            optimizer, before = warmup.optimizer, self.groups[at]
            self.groups[at] = len(optimizer.param_groups)
            if self.groups[at] > before and (rate := optimizer.param_groups[-1]["lr"]) != optimizer.defaults["lr"]:
                rank_zero_warn(
                    f"LargeBatchRegime: a parameter group was added with the learning rate {float(rate):g}, which is "
                    "taken as it is. A group without a rate of its own gets the optimizer's, which is scaled."
                )

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
        for average in self.averages:
            average.give_back()


class ReferencePlateaus:
    """Steps ``ReduceLROnPlateau`` at the end of this run's epoch in which a reference epoch ends.

    Lightning itself would do so after a checkpoint is written, and not at all in the first epoch of a resumed run.
    """

    def __init__(self) -> None:
        self._configs: list[tuple[LRSchedulerConfig, int]] = []  # with the user's frequency
        self.metrics: dict[str, float] = {}

    def take(self, config: LRSchedulerConfig) -> None:
        """Take a scheduler out of Lightning's hands."""
        self._configs.append((config, config.frequency))
        config.interval, config.frequency = "step", NEVER

    def read(self, trainer: Trainer) -> None:
        """Keep what is looked at, for a checkpoint that is written now."""
        if self._configs:
            known = trainer.callback_metrics
            keys = [str(config.monitor) for config, _ in self._configs]
            self.metrics.update({key: float(known[key]) for key in keys if key in known})

    def step(self, trainer: Trainer, pl_module: LightningModule, before: int, now: int) -> None:
        """Step those that the reference run has stepped meanwhile."""
        self.read(trainer)
        for config, every in self._configs:
            if now // every == before // every:
                continue
            metric = self.metrics.get(str(config.monitor))
            if metric is None:
                missing = f"{type(config.scheduler).__name__} looks at {config.monitor}, which nothing has logged yet"
                if config.strict:
                    known = sorted(trainer.callback_metrics)
                    raise MisconfigurationException(f"{missing}. There are {known}: set monitor to one of these.")
                rank_zero_warn(f"{missing}; it is not stepped.")
            else:
                pl_module.lr_scheduler_step(cast(Any, config.scheduler), metric)

    def warn_of_late_metrics(self, trainer: Trainer) -> None:
        """Warn of a metric that came after it was looked at."""
        for config, _ in self._configs:
            used, now = self.metrics.get(str(config.monitor)), trainer.callback_metrics.get(str(config.monitor))
            if used is not None and now is not None and used != float(now) and not math.isnan(used):
                rank_zero_warn(
                    f"LargeBatchRegime: {type(config.scheduler).__name__} looks at {config.monitor} before "
                    "LightningModule.on_train_epoch_end logs it, so at the value of an epoch before. Log it in a step."
                )


def stepping_of(pl_module: LightningModule, reference: Callable[[int, int], Any] | None) -> Stepping:
    """Return how a module's schedulers are stepped: by the module where it does so by itself."""
    if not is_overridden("lr_scheduler_step", pl_module):
        return Stepping(reference=reference)
    return Stepping(lambda scheduler: pl_module.lr_scheduler_step(scheduler, None), reference)


def take_schedulers(
    fit: Fit, plan: RegimePlan, plateaus: ReferencePlateaus, stepping: Stepping, *, stretch: str | bool
) -> tuple[list[ReferenceClock], tuple[SchedulerFate, ...]]:
    """Take those of the reference run's lengths out of Lightning's hands, not of its lists; say what becomes of all."""
    clocks, fates = [], []
    for config in fit.configs:
        fate, every = _fate(config, plan, stretch)
        name = type(config.scheduler).__name__
        fates.append(SchedulerFate(name, fate, config.interval, config.frequency, every))
        if fate is Fate.AT_EPOCH_END:
            plateaus.take(config)
        elif fate not in (Fate.AS_IT_WAS, Fate.THIS_RUNS):
            interval: Interval = "epoch" if config.interval == "epoch" else "step"
            clocks.append(ReferenceClock.of(plan, config.scheduler, interval, config.frequency, stepping))
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
