"""A trainer's limits of epochs and updates: the user's, and this run's in their place. Nothing else sets them."""

from typing import Any, NamedTuple, cast

from lightning.pytorch import Trainer

from lightning_gap.regime.plan import RegimePlan

__all__ = ["Limits", "RunLimits"]


class Limits(NamedTuple):
    """What a trainer's loops are told."""

    max_epochs: int | None  # or -1, for any number
    min_epochs: int
    max_steps: int  # -1 for any number

    @classmethod
    def of(cls, trainer: Trainer) -> "Limits":
        """Return a trainer's."""
        loop = trainer.fit_loop
        return cls(loop.max_epochs, loop.min_epochs or 0, loop.epoch_loop.max_steps)

    def put(self, trainer: Trainer) -> None:
        """Give them to a trainer."""
        loop: Any = trainer.fit_loop
        loop.max_epochs, loop.min_epochs, loop.epoch_loop.max_steps = self

    @property
    def epochs(self) -> int | None:
        """At most so many epochs; ``None`` for any number."""
        return None if self.max_epochs == -1 else self.max_epochs

    @property
    def updates(self) -> int | None:
        """At most so many updates; ``None`` for any number."""
        return None if self.max_steps == -1 else self.max_steps

    @property
    def only_updates(self) -> bool:
        """Whether updates alone are limited."""
        return self.epochs is None and self.updates is not None


class RunLimits:
    """The limits of one run."""

    def __init__(self) -> None:
        self._users: Limits | None = None  # while ours are in their place

    def set(self, trainer: Trainer, plan: RegimePlan) -> None:
        """Put this run's in the place of the user's, once."""
        if self._users is None:
            users = self._users = Limits.of(trainer)
            epochs = users.max_epochs if plan.epochs is None else plan.epochs
            Limits(epochs, plan.min_epochs, plan.max_steps).put(trainer)

    def lift_updates(self, trainer: Trainer) -> None:
        """Lift the limit of updates until :meth:`begin`: with it, Lightning resumes an epoch's end by a stray batch."""
        if self._users is not None:
            trainer.fit_loop.epoch_loop.max_steps = -1

    def lift_epochs(self, trainer: Trainer) -> None:
        """Let a checkpoint be restored that has more epochs behind it, of a larger batch, than this run has in all."""
        if self._users is not None:
            trainer.fit_loop.max_epochs = -1

    def begin(self, trainer: Trainer, plan: RegimePlan, *, changed: bool) -> None:
        """Put this run's in place as training starts, a checkpoint having been restored or not."""
        if self._users is None:
            return
        epochs, steps = self._users.max_epochs if plan.epochs is None else plan.epochs, plan.max_steps
        if plan.epochs is not None:
            needed = plan.epochs_from(trainer.current_epoch, trainer.global_step)
            if needed > plan.epochs or changed:
                # The checkpoint's epochs were not all of this plan's length: its last one cut short and not taken up
                # again, or all of another batch.
                epochs, steps = needed, cast(int, plan.updates)
        Limits(epochs, plan.min_epochs, steps).put(trainer)

    def give_back(self, trainer: Trainer) -> None:
        """Give the user's back."""
        if self._users is not None:
            self._users.put(trainer)
            self._users = None
