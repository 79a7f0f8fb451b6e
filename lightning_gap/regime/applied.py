"""A plan applied to optimizers and schedulers, with or without a Trainer."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal
from warnings import warn

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_gap.regime.clock import ReferenceClock, RegimeClock
from lightning_gap.regime.group_changes import change_of_groups, decided, groups_of
from lightning_gap.regime.lengths import check_lengths
from lightning_gap.regime.plan import RegimePlan
from lightning_gap.regime.rollout import follows_its_factor, optimizer_of
from lightning_gap.regime.scaling import check_rule
from lightning_gap.regime.schedules import check_momentum, check_unscaled, is_of_torch, scale
from lightning_gap.regime.warmup import Warmup

__all__ = ["apply_plan", "check_rates"]


def apply_plan(
    plan: RegimePlan,
    optimizers: Optimizer | Iterable[Optimizer],
    schedulers: Any = (),
    *,
    interval: Literal["epoch", "step"] = "epoch",
    stretch_schedulers: Literal["auto", True] = "auto",
) -> RegimeClock:
    """Do what :meth:`RegimePlan.apply` says."""
    # Each once: what comes twice would be scaled, and stepped, twice.
    optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(dict.fromkeys(optimizers))
    schedulers = () if schedulers is None else schedulers
    schedulers = list(dict.fromkeys(schedulers)) if isinstance(schedulers, Iterable) else [schedulers]
    optimizers = list(dict.fromkeys(_inner(optimizer, "optimizer") for optimizer in optimizers))
    schedulers = [_inner(scheduler, "scheduler") for scheduler in schedulers]
    if interval not in ("epoch", "step"):
        raise ValueError(f'interval={interval!r} must be "epoch" or "step": when the reference run steps schedulers.')
    ticked = [scheduler for scheduler in schedulers if not isinstance(scheduler, ReduceLROnPlateau)]
    if ticked and plan.reference_updates_per_epoch is None:
        raise ValueError("the plan has no lengths to step schedulers by: pass samples= to plan_regime.")
    groups = {id(optimizer.param_groups) for optimizer in optimizers}  # which Fabric's optimizers share with theirs
    for scheduler in schedulers:
        steps = getattr(scheduler, "optimizer", None)
        if steps is not None and id(steps.param_groups) not in groups:
            raise ValueError(
                f"{type(scheduler).__name__} is of another optimizer than those that are scaled: pass that one too, or "
                "make the scheduler of one of these."
            )
    check_unscaled(optimizers)
    plan = decided(plan, optimizers)
    plan = replace(plan, hyperparameters=tuple(change_of_groups(plan, groups_of(optimizers))))
    for optimizer in optimizers:
        if doubt := check_rule(optimizer, plan.lr_rule, plan.ratio, plan.train_longer, plan.rules):
            warn(doubt, stacklevel=3)
    clocks = [ReferenceClock.of(plan, scheduler, interval) for scheduler in ticked]
    for clock in clocks:
        check_lengths(clock, plan, trust=stretch_schedulers is True)
        check_rates(clock, plan)
    check_momentum(schedulers, plan.rescaling)
    scale(optimizers, schedulers, plan.rescaling)
    warmups = [Warmup(each, updates=plan.warmup_updates, factor=plan.lr_factor) for each in optimizers]
    return RegimeClock(plan, clocks, warmups)


def _inner(wrapped: Any, name: str) -> Any:
    """Return what Fabric's and accelerate's wrappers of optimizers and schedulers hold."""
    while type(wrapped).__module__.split(".")[0] in ("lightning", "accelerate") and hasattr(wrapped, name):
        wrapped = getattr(wrapped, name)
    return wrapped


def check_rates(clock: ReferenceClock, plan: RegimePlan) -> None:
    """Refuse a scheduler, of another library than torch, whose learning rates are not all known by their names."""
    if not plan.scales_rates or is_of_torch(clock.scheduler):
        return
    name = type(clock.scheduler).__name__
    if optimizer_of(clock.scheduler) is None:
        raise ValueError(
            f"{name} has no torch optimizer as its attribute optimizer, so its learning rates are unknown. Use a "
            'scheduler of torch or timm, or pass lr_rule="none".'
        )
    follows = follows_its_factor(clock, 2.0 if plan.lr_factor == 1.0 else plan.lr_factor)
    if follows is None:
        raise ValueError(
            f"{name} cannot be copied (copy.deepcopy), so it cannot be rolled out to see whether the learning rates "
            'that its names tell are all. Make it so, or pass lr_rule="none".'
        )
    if not follows:
        raise ValueError(
            f"{name} keeps a learning rate by a name that does not say so, and cannot be scaled. Use a scheduler of "
            'torch or timm, name its rates with "lr", or pass lr_rule="none".'
        )
