"""Schedulers that a large-batch regime cannot be right for, each refused before anything is changed."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import is_dataclass
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim.lr_scheduler import LRScheduler

from lightning_gap.regime.applied import check_rates, clock_of
from lightning_gap.regime.clock import Interval, ReferenceClock, Stepping
from lightning_gap.regime.lengths import check_frequency, check_lengths
from lightning_gap.regime.plan import RegimePlan
from lightning_gap.regime.rollout import Rollout, hidden_lengths, roll_out
from lightning_gap.regime.schedules import horizons

__all__ = ["check_schedulers", "stepping_of"]


def stepping_of(pl_module: LightningModule, reference: Callable[[int, int], Any] | None) -> Stepping:
    """Return how a module's schedulers are stepped: by the module where it does so by itself."""
    if not is_overridden("lr_scheduler_step", pl_module):
        return Stepping(reference=reference)
    return Stepping(lambda scheduler: pl_module.lr_scheduler_step(scheduler, None), reference)


def check_schedulers(
    trainer: Trainer,
    plan: RegimePlan,
    stretch: str | bool,
    *,
    stepping: Stepping,
    batches: Iterable[int],
    otherwise: Callable[[], Any] | None = None,
) -> list[tuple[ReferenceClock, Rollout]]:
    """Refuse the schedulers that cannot be matched, and warn of the doubtful ones.

    Args:
        trainer: The trainer, with its schedulers configured and untouched.
        plan: The plan of the run.
        stretch: The argument ``stretch_schedulers``.
        stepping: How schedulers are stepped.
        batches: Further numbers of batches in an epoch of this run.
        otherwise: Returns what ``configure_optimizers`` returns to other lengths.

    Returns:
        The schedules of the first optimizer, rolled out.
    """
    rollouts = []
    asked = _Asked(trainer, otherwise)
    for at, config in enumerate(trainer.lr_scheduler_configs):
        scheduler, name = config.scheduler, type(config.scheduler).__name__
        if plan.train_longer and plan.updates_per_epoch is None and config.interval == "epoch":
            raise MisconfigurationException(
                f"{name} is stepped every epoch, and the loader does not tell how many updates an epoch has. Use "
                'interval="step", or a loader with a length.'
            )
        if config.reduce_on_plateau:
            _check_plateau(config, plan, stretch)
            continue
        interval: Interval = "epoch" if config.interval == "epoch" else "step"
        clock = ReferenceClock(scheduler, interval, 1, 1, last=1000, stepping=stepping)
        try:
            if plan.reference_updates_per_epoch is not None:
                clock = clock_of(plan, scheduler, interval, config.frequency, stepping)
                if stretch:
                    if stretch is not True:
                        check_frequency(clock, plan, batches)
                    seen = check_lengths(
                        clock,
                        plan,
                        trust=stretch is True,
                        batches=batches,
                        proven=partial(asked.proves, clock, at),
                    )
                    if seen is not None and scheduler.optimizer is trainer.optimizers[0]:
                        rollouts.append((clock, seen))
                    _warn_of_epochs_past_the_end(config, plan, stretch)
            check_rates(clock, plan)
        except ValueError as error:
            raise MisconfigurationException(f"LargeBatchRegime: {error}") from None
    return rollouts


class _Asked:
    """Asks ``configure_optimizers`` again, with other answers: a length that changes is one of the answers.

    Args:
        trainer: The trainer, with its schedulers.
        otherwise: Returns what ``configure_optimizers`` returns to other lengths.
    """

    def __init__(self, trainer: Trainer, otherwise: Callable[[], Any] | None) -> None:
        self._number, self._otherwise = len(trainer.lr_scheduler_configs), otherwise
        self._others: list[Any] | None = None

    def proves(self, clock: ReferenceClock, at: int, what: str, number: int) -> bool:
        """Return whether a length, or without one the curve, of the n-th scheduler comes from the answers."""
        if self._otherwise is None:
            return False
        if self._others is None:
            self._others = list(_schedulers_in(self._otherwise()))
        if len(self._others) != self._number:
            return False
        other = self._others[at]
        if what:
            return hidden_lengths(other).get(what) != number
        return roll_out(clock._replace(scheduler=other)).rates != roll_out(clock).rates


def _schedulers_in(configured: Any) -> Iterator[Any]:
    if isinstance(configured, dict):
        configured = [value for key, value in configured.items() if key in ("scheduler", "lr_scheduler")]
    elif is_dataclass(configured):
        configured = [configured.scheduler] if hasattr(configured, "scheduler") else []
    if isinstance(configured, (list, tuple)):
        for each in configured:
            yield from _schedulers_in(each)
    elif hasattr(configured, "optimizer") and hasattr(configured, "step"):
        yield configured


def _check_plateau(config: LRSchedulerConfig, plan: RegimePlan, stretch: str | bool) -> None:
    if plan.reclocked and stretch and config.interval != "epoch" and (config.frequency > 1 or plan.pace != 1):
        raise MisconfigurationException(
            f"{type(config.scheduler).__name__} with interval={config.interval!r} and frequency={config.frequency} "
            'looks at its metric by batches of this run. Use interval="epoch", or stretch_schedulers=False to leave it '
            "so."
        )


def _warn_of_epochs_past_the_end(config: LRSchedulerConfig, plan: RegimePlan, stretch: str | bool) -> None:
    if not plan.reclocked or stretch is True or config.interval != "epoch" or plan.reference_epochs is None:
        return
    for attribute, steps in horizons(config.scheduler).items() if isinstance(config.scheduler, LRScheduler) else ():
        if steps > plan.reference_epochs:
            rank_zero_warn(
                f"{attribute}={steps} reaches past the reference run's {plan.reference_epochs} epochs, and "
                "LargeBatchRegime takes it for epochs of the reference run. Pass stretch_schedulers=True if they are, "
                "stretch_schedulers=False if it counts epochs of this run."
            )
