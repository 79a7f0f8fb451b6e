"""Everything beside schedulers that counts epochs, and how it comes to count those of the reference run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_gap.regime.fit import Fit
from lightning_gap.regime.plan import RegimePlan
from lightning_gap.trainer.internals.of_lightning import set_checkpoint_epochs, set_stops_at_epoch_end

__all__ = ["NEVER", "EpochCounter", "ValidationClock", "epoch_counters", "patience"]

# More than any number of epochs or batches: an interval that never comes round.
NEVER = 2**62


@dataclass
class EpochCounter:
    """Something that happens in some epochs, ``every`` so many of the reference run.

    While a fit runs ``put`` says yes in every epoch of this run in which a reference epoch of that kind ends, and no in
    the others. So it happens at the first end of an epoch at which the reference run would have done it.
    """

    name: str
    put: Callable[[Any], None]
    every: int
    users: Any  # their value
    no: Any = NEVER  # 1, or True, is yes

    def set(self, plan: RegimePlan, start: int, end: int) -> None:
        """Say whether it happens in the epoch of this run between two updates."""
        due = plan.reference_epochs_in(end) // self.every > plan.reference_epochs_in(start) // self.every
        self.put(type(self.users)(1) if due else self.no)

    def fate(self, plan: RegimePlan) -> str:
        """Return the counter's line in the table."""
        updates = float(self.every * cast(Any, plan.stretched_epoch))
        every = f"every {self.every} reference epoch(s)"
        return f"{self.name}: {every}, at the end of this run's epoch after {updates:g} updates"


def epoch_counters(trainer: Trainer, fit: Fit) -> Iterator[EpochCounter]:
    """Yield what else a trainer does every so many epochs, unless it waits for validations that are within epochs."""
    if (every := fit.check_val_every_n_epoch) is not None and fit.validates_by_epochs:
        yield EpochCounter("validation", partial(setattr, trainer, "check_val_every_n_epoch"), every, every)
    for callback, every, at_epoch_end in fit.counting:
        name = type(callback).__name__
        if isinstance(callback, EarlyStopping):
            if at_epoch_end:
                yield EpochCounter(name, partial(set_stops_at_epoch_end, callback), 1, True, no=False)
        elif every > 0 and (at_epoch_end or not fit.validates_within_epochs):
            yield EpochCounter(name, partial(set_checkpoint_epochs, callback), every, every)


def patience(fit: Fit, plan: RegimePlan, validations: "ValidationClock | None") -> Iterator[str]:
    """Yield how many updates of this run the patience of early stopping is, a line a callback."""
    if plan.stretched_epoch is None:
        return
    within = None if validations is None else validations.every / plan.pace
    each = float(within or (fit.check_val_every_n_epoch or 1) * plan.stretched_epoch)
    for callback, *_ in fit.counting:
        if isinstance(callback, EarlyStopping):
            times = callback.patience
            yield f"{type(callback).__name__}: patience of {times} checks, about {times * each:g} updates"


class ValidationClock:
    """Validates within epochs when the reference run does: ``val_check_interval`` counts its updates.

    Raises:
        ValueError: If the interval is longer than a reference epoch.
    """

    def __init__(self, trainer: Trainer, fit: Fit, plan: RegimePlan) -> None:
        self._trainer, self._plan = cast(Any, trainer), plan
        self._interval: Any = fit.val_check_interval
        self._epochs: Any = fit.check_val_every_n_epoch
        per_epoch = cast(int, plan.reference_updates_per_epoch)
        whole = isinstance(self._interval, int)
        self.every: int = int(self._interval) if whole else max(1, int(per_epoch * self._interval))
        if self.every > per_epoch and self._epochs is not None:
            raise ValueError(
                f"val_check_interval={self._interval} is more than the {per_epoch} updates of an epoch of the "
                "reference run. Lower it, or pass check_val_every_n_epoch=None to count updates over epochs."
            )
        self._checkpoints = [
            (callback, every)
            for callback, every, at_epoch_end in fit.counting
            if isinstance(callback, ModelCheckpoint) and every > 0 and not at_epoch_end
        ]

    @classmethod
    def of(cls, trainer: Trainer, fit: Fit, plan: RegimePlan) -> "ValidationClock | None":
        """Return what validates within epochs, if the reference run does and its epochs have another length."""
        return cls(trainer, fit, plan) if plan.reclocked and fit.validates_within_epochs else None

    def lift(self) -> None:
        """Keep Lightning from comparing the interval with the batches of this run, until :meth:`begin`."""
        self._trainer.val_check_interval = 1.0

    def begin(self, update: int) -> None:
        """Give the user's interval back, and go on after an update."""
        self._trainer.val_check_interval = self._interval
        self.after(update)

    def after(self, update: int | None) -> None:
        """Say whether a validation follows now."""
        due = bool(update) and self._made(cast(int, update)) > self._made(cast(int, update) - 1)
        self._trainer.val_check_batch = 1 if due else NEVER
        if self._epochs is not None:
            self._trainer.check_val_every_n_epoch = 1 if due else self._epochs
        if due:
            per_epoch = cast(int, self._plan.reference_updates_per_epoch)
            epoch = (self._plan.reference_update(cast(int, update)) - 1) // per_epoch + 1
            for callback, every in self._checkpoints:
                set_checkpoint_epochs(callback, NEVER if epoch % every else 1)

    def _made(self, update: int) -> int:
        """Return how many validations the reference run has made."""
        passed = self._plan.reference_update(update)
        if self._epochs is None:
            return passed // self.every
        per_epoch = cast(int, self._plan.reference_updates_per_epoch)
        epochs, within = divmod(passed, per_epoch)
        validated: int = epochs // self._epochs * (per_epoch // self.every)
        return validated + (within // self.every if (epochs + 1) % self._epochs == 0 else 0)

    def give_back(self) -> None:
        """Give the user's values back."""
        self._trainer.val_check_interval, self._trainer.check_val_every_n_epoch = self._interval, self._epochs
        for callback, every in self._checkpoints:
            set_checkpoint_epochs(callback, every)

    @property
    def fate(self) -> str:
        """The clock's line in the table."""
        epochs = "" if self._epochs in (None, 1) else f" of every {self._epochs} reference epochs"
        here = float(self.every / self._plan.pace)
        return f"validation: every {self.every} reference updates{epochs}, {here:.4g} of this run"
