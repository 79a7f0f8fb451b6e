"""Everything beside schedulers that counts epochs, and how it comes to count those of the reference run."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_gap.regime.plan import RegimePlan

__all__ = ["NEVER", "EpochCounter", "epoch_counters", "warn_of_other_counters"]

# More than any number of epochs or batches: an interval that never comes round.
NEVER = 2**62


@dataclass
class EpochCounter:
    """An attribute that says in which epochs something happens.

    While a fit runs it says yes in every epoch of this run in which a reference epoch of that kind ends, and no in the
    others. So what it stands for happens at the first end of an epoch at which the reference run would have done it.

    Args:
        name: What happens, for the table.
        holder: The object with the attribute.
        attribute: Its name.
        every: The user's interval, in epochs of the reference run.
        yes: The value that says that it happens in this epoch.
        no: The value that says that it does not.
    """

    name: str
    holder: Any
    attribute: str
    every: int = 1
    yes: Any = 1
    no: Any = NEVER

    def __post_init__(self) -> None:
        self._users = getattr(self.holder, self.attribute)

    def set(self, plan: RegimePlan, start: int, end: int) -> None:
        """Say whether it happens in the epoch of this run between two updates.

        Args:
            plan: The plan of the run.
            start: Updates made before the epoch.
            end: Updates made after it.
        """
        due = plan.reference_epochs_in(end) // self.every > plan.reference_epochs_in(start) // self.every
        setattr(self.holder, self.attribute, self.yes if due else self.no)

    def give_back(self) -> None:
        """Give the user's value back."""
        setattr(self.holder, self.attribute, self._users)

    @property
    def fate(self) -> str:
        """The counter's line in the table."""
        return f"{self.name}: every {self.every} reference epoch(s), at the end of an epoch of this run"


def epoch_counters(trainer: Trainer) -> Iterator[EpochCounter]:
    """Yield what else a trainer does every so many epochs: validation, early stopping, and checkpoints.

    Validation by batches or by time (``val_check_interval``) is left as it is, and so is an ``EarlyStopping`` or
    ``ModelCheckpoint`` that waits for a validation: it follows the validations.

    Args:
        trainer: The trainer, whose callbacks have been set up, with the user's values in place.
    """
    validates = trainer.check_val_every_n_epoch is not None and trainer.val_check_interval == 1.0
    if validates:
        yield EpochCounter("validation", trainer, "check_val_every_n_epoch", cast(int, trainer.check_val_every_n_epoch))
    for callback in cast(Any, trainer).callbacks:
        name = type(callback).__name__
        if isinstance(callback, ModelCheckpoint) and callback._every_n_epochs > 0:
            yield EpochCounter(name, callback, "_every_n_epochs", callback._every_n_epochs)
        elif isinstance(callback, EarlyStopping) and callback._check_on_train_epoch_end and validates:
            yield EpochCounter(name, callback, "_check_on_train_epoch_end", yes=True, no=False)


def warn_of_other_counters(trainer: Trainer, plan: RegimePlan) -> None:
    """Warn of what counts epochs of this run all the same.

    Args:
        trainer: The trainer, whose callbacks have been set up.
        plan: The plan of the run.
    """
    for callback in cast(Any, trainer).callbacks:
        early = isinstance(callback, EarlyStopping) and callback._check_on_train_epoch_end
        if isinstance(callback, BaseFinetuning) or (early and trainer.val_check_interval != 1.0):
            rank_zero_warn(
                f"LargeBatchRegime: {type(callback).__name__} counts epochs of this run, not of the reference run: "
                f"multiply its epochs by {float(plan.stretch):.4g}."
            )
