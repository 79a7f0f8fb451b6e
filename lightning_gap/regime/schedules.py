"""Learning-rate schedules written for the reference batch: scaled, and ticked on the reference run's clock.

A schedule is not stretched by editing its step sizes. It stays as it is, and is stepped when the *reference* run would
have stepped it. So the learning rate at update t is the factor times the reference run's learning rate at update t, for
every scheduler class, and ``scheduler.state_dict()`` counts what it always counted.
"""

from collections.abc import Iterator
from fractions import Fraction
from math import floor
from typing import Any, Literal, NamedTuple

from torch.optim.lr_scheduler import (
    ChainedScheduler,
    LambdaLR,
    LRScheduler,
    MultiplicativeLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from lightning_gap.regime.scaling import remembered, scaled

__all__ = ["ReferenceClock", "horizons", "scale_momentums", "scale_scheduler", "unread_parts"]

# Every attribute of torch's schedulers that is a learning rate. Schedules are homogeneous in these and the groups'.
_LR_ATTRIBUTES = ("base_lrs", "max_lrs", "min_lrs", "eta_min", "default_min_lr", "_last_lr")
# Every attribute that is a momentum, of those that also move it. OneCycleLR keeps its own in the groups.
_MOMENTUM_ATTRIBUTES = ("base_momentums", "max_momentums")
# Every attribute that says after how many steps a schedule ends or turns.
_HORIZON_ATTRIBUTES = ("T_max", "T_0", "total_iters", "total_steps", "step_size", "milestones", "_milestones")


def flattened(scheduler: LRScheduler) -> Iterator[LRScheduler]:
    """Yield a scheduler and, depth first, those it is composed of."""
    yield scheduler
    if isinstance(scheduler, (SequentialLR, ChainedScheduler)):
        for child in scheduler._schedulers:
            yield from flattened(child)


def scale_scheduler(scheduler: LRScheduler, factor: float) -> None:
    """Multiply every learning rate that a scheduler holds, in place, in its parts too.

    Together with :func:`~lightning_gap.regime.scaling.scale_optimizer` this multiplies the whole remaining schedule by
    the factor.

    Args:
        scheduler: Any torch scheduler.
        factor: What to multiply by.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=10, eta_min=0.25)
        >>> scale_scheduler(cosine, 4.0)
        >>> cosine.base_lrs, cosine.eta_min
        ([4.0], 1.0)
    """
    for part in flattened(scheduler):
        for name in _LR_ATTRIBUTES:
            if hasattr(part, name):
                setattr(part, name, scaled(getattr(part, name), factor))
        if isinstance(part, ReduceLROnPlateau):
            part.eps *= factor  # the least decay of the learning rate that counts


def scale_momentums(scheduler: LRScheduler, ratio: float) -> None:
    r"""Scale the ends between which a scheduler moves Adam's :math:`\beta_1`, in place, in its parts too.

    :math:`1 - \beta \to \kappa (1 - \beta)` is affine, so all values in between follow.

    Args:
        scheduler: Any torch scheduler.
        ratio: The batch that runs over the reference batch, :math:`\kappa`.

    Example:
        >>> import torch
        >>> adam = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
        >>> cyclic = torch.optim.lr_scheduler.CyclicLR(adam, 0.1, 0.2, base_momentum=0.9, max_momentum=0.95)
        >>> scale_momentums(cyclic, 2.0)
        >>> round(cyclic.base_momentums[0], 6), round(cyclic.max_momentums[0], 6)
        (0.8, 0.9)
    """
    for part in flattened(scheduler):
        for name in _MOMENTUM_ATTRIBUTES:
            if hasattr(part, name):
                setattr(part, name, remembered(getattr(part, name), ratio))


def horizons(scheduler: LRScheduler) -> dict[str, int]:
    """Return after how many steps a scheduler, or a part of it, ends or last turns, by attribute name.

    Args:
        scheduler: Any torch scheduler.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> horizons(torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=10))
        {'CosineAnnealingLR.T_max': 10}
    """
    found = {
        f"{type(part).__name__}.{name.lstrip('_')}": getattr(part, name)
        for part in flattened(scheduler)
        for name in _HORIZON_ATTRIBUTES
        if getattr(part, name, None)
    }
    return {name: int(steps if isinstance(steps, (int, float)) else max(steps)) for name, steps in found.items()}


def unread_parts(scheduler: LRScheduler) -> list[str]:
    """Return the classes of a scheduler and its parts whose length, if they have one, :func:`horizons` cannot see.

    Those are the ones that call a function, and other classes than torch's without an attribute that it knows.

    Args:
        scheduler: Any torch scheduler.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> unread_parts(torch.optim.lr_scheduler.LambdaLR(sgd, lambda epoch: max(0.0, 1 - epoch / 30)))
        ['LambdaLR']
    """
    return [
        type(part).__name__
        for part in flattened(scheduler)
        if isinstance(part, (LambdaLR, MultiplicativeLR))
        or not (type(part).__module__.startswith("torch.optim.") or horizons(part))
    ]


class ReferenceClock(NamedTuple):
    """When the reference run steps a scheduler, in this run's updates.

    Attributes:
        scheduler: The scheduler.
        interval: ``"epoch"`` or ``"step"``, as in Lightning's scheduler configuration.
        frequency: Every how many epochs, or every how many updates within an epoch.
        updates_per_epoch: The updates of one reference epoch.
        pace: Reference updates that pass in one update of this run; 1 where it makes as many.
        last: The last reference update; ``None`` where nothing limits them.

    Example:
        >>> clock = ReferenceClock(None, "epoch", 2, 5)
        >>> [update for update in range(1, 31) if clock.steps(update)]
        [10, 20, 30]
        >>> clock = ReferenceClock(None, "step", 2, 5)
        >>> [update for update in range(1, 11) if clock.steps(update)]
        [2, 4, 7, 9]
        >>> clock = ReferenceClock(None, "step", 1, 5, pace=Fraction(5, 2))  # two updates for five of the reference run
        >>> [clock.steps(update) for update in range(1, 5)]
        [2, 3, 2, 3]
    """

    scheduler: Any
    interval: Literal["epoch", "step"]
    frequency: int
    updates_per_epoch: int
    pace: Fraction = Fraction(1)
    last: int | None = None

    def steps(self, update: int) -> int:
        """Return how many times the reference run steps the scheduler between the update before and this one.

        Args:
            update: The number of the update, from 1.
        """
        return self._steps_until(update) - self._steps_until(update - 1)

    def _steps_until(self, update: int) -> int:
        reference_update = floor(self.pace * update)
        if self.last is not None:
            reference_update = min(reference_update, self.last)
        epochs, within = divmod(reference_update, self.updates_per_epoch)
        if self.interval == "epoch":
            return epochs // self.frequency
        return epochs * (self.updates_per_epoch // self.frequency) + within // self.frequency
