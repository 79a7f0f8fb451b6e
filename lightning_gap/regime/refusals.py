"""Optimizers, schedulers and users' code that a regime cannot be right for, each refused with its remedy."""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import is_dataclass
from functools import partial
from typing import Any, TypeVar

from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim.lr_scheduler import LRScheduler

from lightning_gap.regime.applied import check_rates
from lightning_gap.regime.clock import Interval, ReferenceClock, Stepping
from lightning_gap.regime.fit import Fit
from lightning_gap.regime.lengths import check_frequency, check_lengths
from lightning_gap.regime.plan import RegimePlan
from lightning_gap.regime.rates import Rollout
from lightning_gap.regime.rollout import hidden_lengths, roll_out
from lightning_gap.regime.scaling import Rate, check_rule
from lightning_gap.regime.schedules import check_momentum, check_unscaled, horizons

__all__ = ["check_fit", "refused_as", "sets_rate"]

_T = TypeVar("_T")
# A learning rate that is set, and one that is read.
_GROUP = r"param_groups\[[^\]]*\]|\b\w*(?:group|pg)\w*|\b[gp]"
_TO = (
    r"""(?:\[["']lr["']\](?:\s*=(?!=)|\.(?:fill_|copy_)\()|\.update\(\s*(?:\{\s*["']lr["']\s*:|lr\s*=))"""
    r"(?P<value>.*)"
)
_NAMES_GROUP = re.compile(r"\bfor\s+(\w+)\s+in\s+[^:]*param_groups")
_READS_RATE = re.compile(r"""\[["'](initial_)?lr["']\]""")
_CHANGES_RATE = re.compile(r"""\[["']lr["']\]\s*[*/]?=(?!=)""")
_NOT_THE_USERS = ("lightning.", "lightning_gap.", "torch.")


def refused_as(make: Callable[..., _T], *args: Any, **options: Any) -> _T:
    """Return what a function returns; what it refuses by a ``ValueError`` is refused in the words of Lightning."""
    try:
        return make(*args, **options)
    except ValueError as error:
        raise MisconfigurationException(f"LargeBatchRegime: {error}") from None


def check_fit(
    fit: Fit,
    plan: RegimePlan,
    stretch: str | bool,
    *,
    stepping: Stepping,
    batches: Iterable[int],
    otherwise: Callable[[], Any] | None,
) -> list[tuple[ReferenceClock, Rollout]]:
    """Refuse optimizers, schedulers and users' code before anything is changed, and warn of what is doubtful.

    Returns the schedules of the first optimizer, rolled out.
    """
    _check_optimizers(fit, plan)
    if plan.scales_rates:
        _check_hand_set_rates(fit)
    if plan.rescaling.changes:
        refused_as(check_unscaled, fit.optimizers)
        refused_as(check_momentum, fit.schedulers, plan.rescaling)
    asked = _Asked(len(fit.configs), otherwise)
    rollouts = []
    for at, config in enumerate(fit.configs):
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
        if plan.reference_updates_per_epoch is not None:
            clock = ReferenceClock.of(plan, scheduler, interval, config.frequency, stepping)
            if stretch:
                if stretch is not True:
                    refused_as(check_frequency, clock, plan, batches)
                proven = partial(asked.proves, clock, at)
                seen = refused_as(check_lengths, clock, plan, trust=stretch is True, batches=batches, proven=proven)
                if seen is not None and scheduler.optimizer is fit.optimizers[0]:
                    rollouts.append((clock, seen))
                _warn_of_epochs_past_the_end(config, plan, stretch)
        refused_as(check_rates, clock, plan)
    if plan.reclocked and stretch:
        _check_hand_stepped(fit)
    if plan.rescaling.changes:
        _warn_of_kept_optimizers(fit)
    if plan.reclocked and plan.stretch != 1:
        _warn_of_other_counters(fit, plan)
    return rollouts


def _check_optimizers(fit: Fit, plan: RegimePlan) -> None:
    """Refuse the optimizers that the rule is not for, and those whose gradients cannot be clipped."""
    rule = plan.lr_rule if plan.rate is Rate.RULED else "none"
    for optimizer in fit.optimizers:
        if not optimizer.param_groups:
            continue  # Lightning's stand-in for none
        try:
            doubt = check_rule(optimizer, rule, plan.ratio, plan.train_longer, plan.rules)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from None
        if doubt is not None:
            rank_zero_warn(f"LargeBatchRegime: {doubt}")
        if plan.clip_norm is not None and optimizer in fit.kept_scaled:
            raise MisconfigurationException(
                f"clip_norm={plan.clip_norm} cannot clip for a fused {type(optimizer).__name__} with 16-bit mixed "
                "precision, which unscales gradients inside its step. Pass fused=False to it, or use bf16-mixed."
            )


def _warn_of_kept_optimizers(fit: Fit) -> None:
    for name, value in vars(fit.module).items():
        if any(value is optimizer for optimizer in fit.optimizers):
            rank_zero_warn(
                f"LargeBatchRegime: the module keeps its optimizer as {name}, whose learning rates stay scaled "
                "after fit, for a fit without the callback too. Make a new one in configure_optimizers."
            )


def _check_hand_set_rates(fit: Fit) -> None:
    """Refuse code that sets a learning rate past its schedulers, to a number of its own: it would not be scaled."""
    for place, source in _methods_of_users(fit):
        groups = _NAMES_GROUP.findall(source)
        for line in source.splitlines():
            if sets_rate(line, groups):
                raise MisconfigurationException(
                    f"LargeBatchRegime: {place} sets a learning rate to a number of its own "
                    f"({line.strip()}), which is not scaled. Use a scheduler, such as LinearLR for a warm-up, "
                    'change the rate by a factor, or pass lr_rule="none".'
                )


def sets_rate(line: str, groups: Iterable[str] = ()) -> bool:
    """Return whether a line of code sets a learning rate to a number of its own."""
    named = "|".join([_GROUP, *(rf"\b{group}" for group in groups)])
    found = re.search(rf"^[^#]*?(?:{named}){_TO}", line)
    return found is not None and not _READS_RATE.search(found["value"])


def _warn_of_other_counters(fit: Fit, plan: RegimePlan) -> None:
    """Warn of what counts epochs of this run all the same."""
    for place, source in _methods_of_users(fit):
        if "current_epoch" in source and _CHANGES_RATE.search(source):
            rank_zero_warn(
                f"LargeBatchRegime: {place} changes a learning rate by current_epoch, which counts epochs of this run. "
                "Read the callback's reference_epoch there, or use a scheduler."
            )
    for callback in fit.callbacks:
        if isinstance(callback, BaseFinetuning):
            rank_zero_warn(
                f"LargeBatchRegime: {type(callback).__name__} counts epochs of this run, not of the reference run: "
                f"multiply its epochs by {float(plan.stretch):.4g}."
            )


def _check_hand_stepped(fit: Fit) -> None:
    """Refuse code that steps schedulers beside Lightning, which does so by itself under automatic optimization."""
    for place, source in _methods_of_users(fit):
        if fit.module.automatic_optimization and "lr_schedulers(" in source and ".step(" in source:
            raise MisconfigurationException(
                f"LargeBatchRegime: {place} steps schedulers by itself, at epochs and updates of this run. Return them "
                'from configure_optimizers with their interval, "epoch" or "step", and leave the stepping to Lightning.'
            )


def _methods_of_users(fit: Fit) -> Iterator[tuple[str, str]]:
    for owner in (fit.module, *fit.callbacks):
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


class _Asked:
    """Asks ``configure_optimizers`` again, with other answers: a length that changes is one of the answers."""

    def __init__(self, number: int, otherwise: Callable[[], Any] | None) -> None:
        self._number, self._otherwise = number, otherwise
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
