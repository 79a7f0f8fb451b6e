"""What a trainer says when a fit starts: asked once, and a value from then on."""

from typing import Any, NamedTuple, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import Optimizer

from lightning_gap.trainer.internals.of_lightning import checkpoint_epochs, stops_at_epoch_end, validation_seconds
from lightning_gap.trainer.strategy import gradients_stay_scaled

__all__ = ["Counting", "Fit"]


class Counting(NamedTuple):
    """A callback that counts epochs: every how many, and whether after training and not after validations."""

    callback: Callback
    every: int
    at_epoch_end: bool


class Fit(NamedTuple):
    """What is checked, scaled and taken over."""

    module: LightningModule
    callbacks: list[Callback]
    optimizers: list[Optimizer]
    configs: list[LRSchedulerConfig]
    kept_scaled: list[Optimizer]  # which take the loss scale off their gradients inside their steps
    counting: list[Counting]
    val_check_interval: int | float
    check_val_every_n_epoch: int | None
    by_time: bool  # whether validations are

    @classmethod
    def of(cls, trainer: Trainer, pl_module: LightningModule) -> "Fit":
        """Ask a trainer."""
        callbacks: list[Callback] = cast(Any, trainer).callbacks
        counting = []
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint):
                counting.append(Counting(callback, *checkpoint_epochs(callback)))
            elif isinstance(callback, EarlyStopping):
                counting.append(Counting(callback, 1, stops_at_epoch_end(callback)))
        return cls(
            module=pl_module,
            callbacks=callbacks,
            optimizers=trainer.optimizers,
            configs=trainer.lr_scheduler_configs,
            kept_scaled=[each for each in trainer.optimizers if gradients_stay_scaled(trainer, each)],
            counting=counting,
            val_check_interval=getattr(trainer, "val_check_interval", 1.0),  # by time there is none
            check_val_every_n_epoch=trainer.check_val_every_n_epoch,
            by_time=validation_seconds(trainer) is not None,
        )

    @property
    def schedulers(self) -> list[Any]:
        """All schedulers, those that look at a metric too."""
        return [config.scheduler for config in self.configs]

    @property
    def rates(self) -> list[float]:
        """The learning rates of all groups now; some optimizers find their own."""
        rates = [group.get("lr") for optimizer in self.optimizers for group in optimizer.param_groups]
        return [float(rate) for rate in rates if rate is not None]

    @property
    def validates_by_epochs(self) -> bool:
        """Whether an interval of validations is whole epochs."""
        return isinstance(self.val_check_interval, float) and self.val_check_interval == 1.0

    @property
    def validates_within_epochs(self) -> bool:
        """Whether validations are by batches, neither by epochs nor by time."""
        return not self.validates_by_epochs and not self.by_time
