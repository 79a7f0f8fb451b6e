"""What a large-batch regime cannot be right for, each refused before anything is changed, with its remedy."""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import is_dataclass
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim.lr_scheduler import LRScheduler

from lightning_gap.regime.applied import check_rates, clock_of
from lightning_gap.regime.clock import ReferenceClock
from lightning_gap.regime.lengths import check_frequency, check_lengths
from lightning_gap.regime.plan import RegimePlan
from lightning_gap.regime.rollout import (
    Rollout,
    hidden_lengths,
    roll_out,
)
from lightning_gap.regime.scaling import check_rule
from lightning_gap.regime.schedules import horizons
from lightning_gap.trainer.internals.of_lightning import is_compiled_by_lightning
from lightning_gap.trainer.strategy import gradients_stay_scaled, leaves_updates_to_torch, strategy_name

__all__ = [
    "changes_by_epoch",
    "check_hand_set_rates",
    "check_hand_stepped",
    "check_optimizers",
    "check_schedulers",
    "check_trainer",
    "keeps_lengths",
    "stepper",
]


# A learning rate that is set, and one that is read.
_GROUP = r"param_groups\[[^\]]*\]|\b\w*(?:group|pg)\w*|\b[gp]"
_TO = (
    r"""(?:\[["']lr["']\](?:\s*=(?!=)|\.(?:fill_|copy_)\()|\.update\(\s*(?:\{\s*["']lr["']\s*:|lr\s*=))"""
    r"(?P<value>.*)"
)
_SETS_RATE = re.compile(rf"^[^#]*?(?:{_GROUP}){_TO}")
_NAMES_GROUP = re.compile(r"\bfor\s+(\w+)\s+in\s+[^:]*param_groups")
_READS_RATE = re.compile(r"""\[["'](initial_)?lr["']\]""")
_CHANGES_RATE = re.compile(r"""\[["']lr["']\]\s*[*/]?=(?!=)""")
_NOT_THE_USERS = ("lightning.", "lightning_gap.", "torch.")


def check_trainer(trainer: Any, pl_module: LightningModule, *, train_longer: bool, gradient_noise: bool) -> None:
    """Refuse the trainers and modules whose batch or updates cannot be planned.

    Args:
        trainer: The trainer, in ``setup``.
        pl_module: Its module.
        train_longer: Whether the run is to make more updates than its epochs have.
        gradient_noise: Whether samples are to be weighted.
    """
    shorter = "pass train_longer=False to scale the learning rate alone."
    limit = trainer.limit_train_batches  # 1 is one batch, 1.0 is all of them
    averages = _has(trainer, StochasticWeightAveraging)
    refusals = (
        (
            not leaves_updates_to_torch(trainer),
            f"{strategy_name(trainer)} is not supported. Use one device, DDP, or ModelParallelStrategy (FSDP2).",
        ),
        (
            not pl_module.automatic_optimization and train_longer,
            "manual optimization steps its own optimizers and schedulers, so the trainer cannot count them as the "
            "reference run would. Apply a plan of your own, plan_regime(...).apply(optimizer, schedulers), and step "
            f"its clock; or {shorter}",
        ),
        (
            not pl_module.automatic_optimization and gradient_noise,
            "gradient_noise weights one backward pass a batch, and manual optimization may have several. Use automatic "
            "optimization.",
        ),
        (
            gradient_noise and is_compiled_by_lightning(pl_module),
            "gradient_noise cannot hook into a compiled LightningModule. Compile the network inside it instead.",
        ),
        (
            _has(trainer, BatchSizeFinder),
            "BatchSizeFinder changes the batch after the plan. Call Tuner.scale_batch_size first.",
        ),
        (
            _has(trainer, GradientAccumulationScheduler),
            "GradientAccumulationScheduler changes the batch during the run. Use Trainer(accumulate_grad_batches=...).",
        ),
        (
            averages and train_longer,
            "StochasticWeightAveraging replaces the schedulers at an epoch of its own. Use WeightAveraging or "
            f"EMAWeightAveraging, which average by updates, or {shorter}",
        ),
        (
            train_longer and (isinstance(limit, int) or limit != 1.0 or trainer.overfit_batches != 0),
            f"limit_train_batches={limit} and overfit_batches={trainer.overfit_batches} cut the "
            f"epoch in batches, whose size differs from the reference run's. Use a Subset of the data, or {shorter}",
        ),
        (
            train_longer and trainer.reload_dataloaders_every_n_epochs > 0,
            f"reload_dataloaders_every_n_epochs={trainer.reload_dataloaders_every_n_epochs} may change the number of "
            f"updates in an epoch. Leave it 0, or {shorter}",
        ),
    )
    for refused, reason in refusals:
        if refused:
            raise MisconfigurationException(f"LargeBatchRegime: {reason}")
    if averages:
        rank_zero_warn("LargeBatchRegime: the swa_lrs of StochasticWeightAveraging are not scaled.")


def _has(trainer: Any, kind: type[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in trainer.callbacks)


def keeps_lengths(trainer: Any, pl_module: LightningModule) -> bool:
    """Return whether the lengths of a run that is not to be trained longer are its own.

    So they are where the updates of an epoch cannot be told, or something else changes them or the schedulers.

    Args:
        trainer: The trainer, in ``setup``.
        pl_module: Its module.
    """
    limit = trainer.limit_train_batches
    return bool(
        not pl_module.automatic_optimization
        or _has(trainer, StochasticWeightAveraging)
        or isinstance(limit, int)
        or limit != 1.0
        or trainer.overfit_batches != 0
        or trainer.reload_dataloaders_every_n_epochs > 0
    )


def check_optimizers(trainer: Trainer, plan: RegimePlan) -> None:
    """Refuse the optimizers that the rule is not for, and those whose gradients cannot be clipped.

    Args:
        trainer: The trainer, with its optimizers configured and untouched.
        plan: The plan of the run.
    """
    for optimizer in trainer.optimizers:
        if not optimizer.param_groups:
            continue  # Lightning's stand-in for none
        try:
            doubt = check_rule(optimizer, plan.lr_rule, plan.ratio, plan.train_longer)
        except ValueError as error:
            circle = ' Use a smaller batch, or lr_rule="sqrt", which scales the learning rate alone.'
            raise MisconfigurationException(
                f"{error}{circle if plan.lr_rule == 'adam' and 'turn' in str(error) else ''}"
            ) from None
        if doubt is not None:
            rank_zero_warn(f"LargeBatchRegime: {doubt}")
        if plan.clip_norm is not None and gradients_stay_scaled(trainer, optimizer):
            raise MisconfigurationException(
                f"clip_norm={plan.clip_norm} cannot clip for a fused {type(optimizer).__name__} with 16-bit mixed "
                "precision, which unscales gradients inside its step. Pass fused=False to it, or use bf16-mixed."
            )


def check_hand_set_rates(trainer: Any, pl_module: LightningModule) -> None:
    """Refuse code that sets a learning rate past its schedulers, to a number of its own: it would not be scaled.

    Args:
        trainer: The trainer.
        pl_module: Its module.
    """
    for place, source in _methods_of_users(trainer, pl_module):
        named = "|".join([_GROUP, *(rf"\b{group}" for group in _NAMES_GROUP.findall(source))])
        for line in source.splitlines():
            found = re.search(rf"^[^#]*?(?:{named}){_TO}", line)
            if found and not _READS_RATE.search(found["value"]):
                raise MisconfigurationException(
                    f"LargeBatchRegime: {place} sets a learning rate to a number of its own "
                    f"({line.strip()}), which is not scaled. Use a scheduler, such as LinearLR for a warm-up, "
                    'change the rate by a factor, or pass lr_rule="none".'
                )


def changes_by_epoch(trainer: Any) -> list[str]:
    """Return the methods that change a learning rate in an epoch of their choice, which is one of this run.

    Args:
        trainer: The trainer.
    """
    methods = _methods_of_users(trainer, trainer.lightning_module)
    return [place for place, source in methods if "current_epoch" in source and _CHANGES_RATE.search(source)]


def check_hand_stepped(trainer: Any, pl_module: LightningModule) -> None:
    """Refuse code that steps schedulers beside Lightning, which does so by itself under automatic optimization.

    Args:
        trainer: The trainer.
        pl_module: Its module.
    """
    for place, source in _methods_of_users(trainer, pl_module):
        if pl_module.automatic_optimization and "lr_schedulers(" in source and ".step(" in source:
            raise MisconfigurationException(
                f"LargeBatchRegime: {place} steps schedulers by itself, at epochs and updates of this run. Return them "
                'from configure_optimizers with their interval, "epoch" or "step", and leave the stepping to Lightning.'
            )


def _methods_of_users(trainer: Any, pl_module: LightningModule) -> Iterator[tuple[str, str]]:
    for owner in (pl_module, *trainer.callbacks):
        for kind in type(owner).__mro__:
            if kind.__module__.startswith(_NOT_THE_USERS) or kind is object:
                continue
            for name, method in vars(kind).items():
                if name != "configure_optimizers" and inspect.isfunction(method):
                    yield f"{kind.__name__}.{name}", _source(method)


def _source(method: Any) -> str:
    try:
        return inspect.getsource(method)
    except (OSError, TypeError):
        return ""


def stepper(pl_module: LightningModule) -> Callable[[Any], Any] | None:
    """Return what steps a scheduler where the module does so by itself, else ``None``.

    Args:
        pl_module: The module.
    """
    if not is_overridden("lr_scheduler_step", pl_module):
        return None
    return lambda scheduler: pl_module.lr_scheduler_step(scheduler, None)


def check_schedulers(
    trainer: Trainer,
    plan: RegimePlan,
    stretch: str | bool,
    *,
    step: Callable[[Any], Any] | None,
    reference: Callable[[int, int], Any] | None,
    batches: Iterable[int],
    otherwise: Callable[[], Any] | None = None,
) -> list[tuple[ReferenceClock, Rollout]]:
    """Refuse the schedulers that cannot be matched, and warn of the doubtful ones.

    Args:
        trainer: The trainer, with its schedulers configured and untouched.
        plan: The plan of the run.
        stretch: The argument ``stretch_schedulers``.
        step: Steps a scheduler once.
        reference: The context of a step, of the reference run's place.
        batches: Further numbers of batches in an epoch of this run.
        otherwise: Returns what ``configure_optimizers`` returns to other lengths.

    Returns:
        The schedules of the first optimizer, rolled out.
    """
    rollouts = []
    asked = _Asked(trainer, otherwise, step, reference)
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
        clock = ReferenceClock(scheduler, "epoch" if config.interval == "epoch" else "step", 1, 1, last=1000)
        try:
            if plan.reference_updates_per_epoch is not None:
                clock = clock_of(plan, scheduler, clock.interval, config.frequency)
                if stretch:
                    if stretch is not True:
                        check_frequency(clock, plan, batches)
                    seen = check_lengths(
                        clock,
                        plan,
                        trust=stretch is True,
                        batches=batches,
                        proven=partial(asked.proves, clock, plan, at),
                        step=step,
                        reference=reference,
                    )
                    if seen is not None and scheduler.optimizer is trainer.optimizers[0]:
                        rollouts.append((clock, seen))
                    _warn_of_epochs_past_the_end(config, plan, stretch)
            check_rates(clock, plan, step, reference)
        except ValueError as error:
            raise MisconfigurationException(f"LargeBatchRegime: {error}") from None
    return rollouts


class _Asked:
    """Asks ``configure_optimizers`` again, with other answers: a length that changes is one of the answers.

    Args:
        trainer: The trainer, with its schedulers.
        otherwise: Returns what ``configure_optimizers`` returns to other lengths.
        step: Steps a scheduler once.
        reference: The context of a step.
    """

    def __init__(
        self,
        trainer: Trainer,
        otherwise: Callable[[], Any] | None,
        step: Callable[[Any], Any] | None,
        reference: Callable[[int, int], Any] | None,
    ) -> None:
        self._number, self._otherwise = len(trainer.lr_scheduler_configs), otherwise
        self._step, self._reference = step, reference
        self._others: list[Any] | None = None

    def proves(self, clock: ReferenceClock, plan: RegimePlan, at: int, what: str, number: int) -> bool:
        """Return whether a length, or without one the curve, of the n-th scheduler comes from the answers.

        Args:
            clock: The scheduler's clock.
            plan: The plan of the run.
            at: The scheduler's place among all.
            what: Where the length is.
            number: The length.
        """
        if self._otherwise is None:
            return False
        if self._others is None:
            self._others = list(_schedulers_in(self._otherwise()))
        if len(self._others) != self._number:
            return False
        other = self._others[at]
        if what:
            return hidden_lengths(other).get(what) != number
        rates = [
            roll_out(clock._replace(scheduler=each), plan, self._step, self._reference).rates
            for each in (other, clock.scheduler)
        ]
        return rates[0] != rates[1]


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
