"""Numbers that change while a map is trained: the weight of the gap, and the regularization."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

from lightning.pytorch import LightningModule
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_gap.checks import check_choice, check_integer, check_number

__all__ = ["Anneal", "Schedule", "counts", "now", "number_or_schedule", "stepped"]

Schedule = Callable[[int], float]
"""A function from the number of optimizer updates so far to a number."""

Shape = Literal["geometric", "linear", "cosine"]


@dataclass(frozen=True)
class Anneal:
    r"""A number that goes from ``start`` to ``end`` in so many updates, and stays there.

    With :math:`s = \min(t / \mathrm{updates}, 1)` the share of the way after t updates,

    .. math::
        \text{geometric: } a^{1-s} b^s, \quad \text{linear: } (1-s)\,a + s\,b, \quad
        \text{cosine: } b + (a-b)\,\tfrac{1 + \cos \pi s}{2} .

    Args:
        start: :math:`a`, the value before the first update.
        end: :math:`b`, the value from update ``updates`` on.
        updates: Optimizer updates that it takes.
        shape: ``"geometric"`` (the default, for positive numbers), ``"linear"`` or ``"cosine"``.

    Raises:
        TypeError: ``updates`` is no integer.
        ValueError: A number is not finite or out of range, or the shape is not known.

    Example:
        >>> epsilon = Anneal(100.0, 1.0, updates=2)
        >>> [round(epsilon(t), 6) for t in range(4)]
        [100.0, 10.0, 1.0, 1.0]
    """

    start: float
    end: float
    updates: int
    shape: Shape = "geometric"

    def __post_init__(self) -> None:
        check_choice("shape", self.shape, get_args(Shape))
        check_integer("updates", self.updates)
        for name, value in (("start", self.start), ("end", self.end)):
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (self.shape == "geometric" and value == 0):
                least = "positive" if self.shape == "geometric" else "of at least 0"
                raise ValueError(f"{name} must be a finite number, {least} for shape={self.shape!r}, got {value!r}")

    @property
    def hparams(self) -> dict[str, Any]:
        """The arguments, for a checkpoint."""
        return asdict(self)

    def __call__(self, updates: int) -> float:
        """Return the number after so many updates.

        Args:
            updates: Optimizer updates so far.
        """
        s = min(updates / self.updates, 1.0)
        if s == 1:
            return float(self.end)
        if self.shape == "geometric":
            return float(self.start ** (1 - s) * self.end**s)
        if self.shape == "linear":
            return float((1 - s) * self.start + s * self.end)
        return float(self.end + (self.start - self.end) * (1 + math.cos(math.pi * s)) / 2)


def number_or_schedule(
    name: str, value: Any, *, least: float | None = None, above: float | None = None
) -> float | Schedule:
    """Return a number that is checked, or a schedule."""
    return cast(Schedule, value) if callable(value) else check_number(name, value, least=least, above=above)


def now(value: float | Schedule, updates: int) -> float:
    """Return what a number or a schedule is after so many updates."""
    return float(value(updates)) if callable(value) else value


def counts(weight: float | Schedule) -> bool:
    """Return whether what a weight is of is trained by, rather than only measured."""
    return callable(weight) or weight > 0


def stepped(scheduler: LRScheduler, monitor: str, module: LightningModule) -> dict[str, Any]:
    """Return how Lightning is to step a scheduler: after every update, and one of plateaus after every validation."""
    if not isinstance(scheduler, ReduceLROnPlateau):
        return {"scheduler": scheduler, "interval": "step"}
    every = module.trainer.check_val_every_n_epoch or 1
    return {"scheduler": scheduler, "interval": "epoch", "frequency": every, "monitor": monitor}
