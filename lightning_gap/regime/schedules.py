"""Learning-rate schedules written for the reference batch: scaled, and ticked on the reference run's clock.

A schedule is not stretched by editing its step sizes. It stays as it is, and is stepped when the *reference* run would
have stepped it. So the learning rate at update t is the factor times the reference run's learning rate at update t, for
every scheduler class, and ``scheduler.state_dict()`` counts what it always counted.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakSet

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, CyclicLR, LRScheduler, ReduceLROnPlateau, SequentialLR

from lightning_gap.regime.rules.hyperparameters import Rescaling
from lightning_gap.regime.scaling import scale_optimizer, scaled
from lightning_gap.trainer.internals.of_torch import SCHEDULER_MILESTONES, SCHEDULER_RATES, parts_of_scheduler

__all__ = ["check_momentum", "check_unscaled", "horizons", "is_of_torch", "scale", "scale_scheduler"]

# What has been scaled: who keeps an optimizer must not have it scaled again.
_scaled: WeakSet[Optimizer] = WeakSet()

# Every attribute of torch's schedulers that is a learning rate. Schedules are homogeneous in these and the groups'.
_LR_ATTRIBUTES = ("base_lrs", "max_lrs", "min_lrs", "eta_min", "default_min_lr", *SCHEDULER_RATES)
# The words by which other schedulers name theirs, and two names of timm's: rates, and what is added to one in a step.
_LR_WORDS = {"lr", "lrs", "eta"}
_TIMM_ATTRIBUTES = ("base_values", "warmup_steps")
# Every attribute that is a momentum, of those that also move it. OneCycleLR keeps its own in the groups.
_MOMENTUM_ATTRIBUTES = ("base_momentums", "max_momentums")
# Every attribute that says after how many steps a schedule ends or turns.
_HORIZON_ATTRIBUTES = (
    "T_max",
    "T_0",
    "total_iters",
    "total_steps",
    "total_size",
    "step_size",
    "anneal_epochs",
    "milestones",
    *SCHEDULER_MILESTONES,
)


def flattened(scheduler: Any) -> Iterator[Any]:
    """Yield a scheduler and, depth first, those it is composed of."""
    yield scheduler
    if isinstance(scheduler, (SequentialLR, ChainedScheduler)):
        for child in parts_of_scheduler(scheduler):
            yield from flattened(child)


def _rate_attributes(part: Any) -> list[str]:
    """Return the names of the attributes that are learning rates, of another scheduler than torch's by their names."""
    names = [name for name in _LR_ATTRIBUTES if hasattr(part, name)]
    if is_of_torch(part):
        return names
    names += [name for name in _TIMM_ATTRIBUTES if hasattr(part, "base_values") and hasattr(part, name)]
    names += [name for name in vars(part) if _LR_WORDS & set(name.split("_")) and _is_rate(vars(part)[name])]
    return list(dict.fromkeys(names))


def _is_rate(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(_is_rate, value))
    return isinstance(value, Tensor) or (isinstance(value, (int, float)) and not isinstance(value, bool))


def is_of_torch(scheduler: Any) -> bool:
    """Return whether a scheduler's class is torch's own, whose learning rates are known by name."""
    return type(scheduler).__module__.startswith("torch.optim.")


def scale_scheduler(scheduler: Any, rescaling: Rescaling) -> None:
    """Multiply every learning rate that a scheduler holds, in place, in its parts too.

    Together with :func:`~lightning_gap.regime.scaling.scale_optimizer` this multiplies the whole remaining schedule by
    the factor. Of other schedulers than torch's, learning rates are known by their names; whether these were all, only
    a roll-out shows. The ends between which a scheduler moves Adam's first beta follow the moments: what becomes of
    these under a rule by name is affine, so all values in between follow too.

    Example:
        >>> import torch
        >>> adam = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=10, eta_min=0.25)
        >>> scale_scheduler(cosine, Rescaling(lr_factor=4.0))
        >>> cosine.base_lrs, cosine.eta_min
        ([4.0], 1.0)
        >>> cyclic = torch.optim.lr_scheduler.CyclicLR(adam, 0.1, 0.2, base_momentum=0.9, max_momentum=0.95)
        >>> scale_scheduler(cyclic, Rescaling(ratio=2.0, betas="sde"))
        >>> round(cyclic.base_momentums[0], 6), round(cyclic.max_momentums[0], 6)
        (0.8, 0.9)
    """
    factor = rescaling.lr_factor
    for part in flattened(scheduler):
        for name in _rate_attributes(part) if factor != 1.0 else ():
            setattr(part, name, scaled(getattr(part, name), factor))
        for name in _MOMENTUM_ATTRIBUTES if rescaling.betas != "none" else ():
            if hasattr(part, name):
                setattr(part, name, rescaling.end(part.optimizer, getattr(part, name)))
        if isinstance(part, ReduceLROnPlateau):
            part.eps *= factor  # the least decay of the learning rate that counts


def check_unscaled(optimizers: Iterable[Optimizer]) -> None:
    """Refuse optimizers whose learning rates are scaled already."""
    if any(optimizer in _scaled for optimizer in optimizers):
        raise ValueError(
            "an optimizer of an earlier fit has come again, whose learning rates are scaled already. Make a new "
            "optimizer and new schedulers for each run, in configure_optimizers under a Trainer."
        )


def check_momentum(schedulers: Iterable[Any], rescaling: Rescaling) -> float:
    """Refuse schedulers under which momentum cannot follow; return what the last one's rates are multiplied by."""
    factor = rescaling.lr_factor
    for scheduler in schedulers if rescaling.momentum != "none" and rescaling.pace != 1 else ():
        name, optimizer = type(scheduler).__name__, scheduler.optimizer
        for part in flattened(scheduler):
            moved = getattr(part, "cycle_momentum", False) and any(
                "momentum" in each for each in optimizer.param_groups
            )
            if moved:
                raise ValueError(
                    f'momentum_rule="half_life" cannot follow {name}, which moves the momentum itself. Pass it '
                    "cycle_momentum=False."
                )
        factors = {rescaling.rate_factor(optimizer, group) for group in optimizer.param_groups}
        if len(factors) > 1:
            raise ValueError(
                f'momentum_rule="half_life" scales the rates of groups of different momentum differently, and {name} '
                "has rates for all of them. Give the groups one momentum."
            )
        factor = factors.pop() if factors else factor
    return factor


def scale(
    optimizers: Sequence[Optimizer], schedulers: Iterable[Any], rescaling: Rescaling, *, defaults: bool = True
) -> None:
    """Change every hyperparameter of optimizers and schedulers by rules, in place; ``defaults``: for new groups too."""
    schedulers = list(schedulers)
    # Before the groups change, whose momentum tells.
    factors = [check_momentum([scheduler], rescaling) for scheduler in schedulers]
    for optimizer in optimizers:
        if any(rescaling.at(optimizer, group) for group in optimizer.param_groups):
            _scaled.add(optimizer)
        scale_optimizer(optimizer, rescaling, defaults=defaults)
    for scheduler, factor in zip(schedulers, factors, strict=True):
        scale_scheduler(scheduler, replace(rescaling, lr_factor=factor))


def horizons(scheduler: LRScheduler) -> dict[str, int]:
    """Return after how many steps a scheduler, or a part of it, ends or last turns, by attribute name."""
    found = {
        f"{type(part).__name__}.{name.lstrip('_')}": getattr(part, name)
        for part in flattened(scheduler)
        for name in _HORIZON_ATTRIBUTES
        if getattr(part, name, None)
    }
    for part in flattened(scheduler):
        if isinstance(part, CyclicLR):
            found["CyclicLR.step_size_up"] = round(part.total_size * part.step_ratio)
    return {name: int(steps if isinstance(steps, (int, float)) else max(steps)) for name, steps in found.items()}
