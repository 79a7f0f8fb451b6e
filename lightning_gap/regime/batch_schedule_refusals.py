"""Trainers and modules that a batch schedule cannot be right for."""

from typing import Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_gap.regime.callback import LargeBatchRegime
from lightning_gap.trainer.internals.of_lightning import validation_seconds
from lightning_gap.trainer.strategy import leaves_updates_to_torch, strategy_name

__all__ = ["check_trainer"]


def check_trainer(trainer: Any, pl_module: LightningModule, most: int | None, *, adaptive: bool) -> None:
    """Refuse the trainers and modules whose batches or updates are not ours to make."""
    by_time = validation_seconds(trainer) is not None
    interval = None if by_time else trainer.val_check_interval

    def has(*kinds: type[Callback]) -> bool:
        return any(isinstance(callback, kinds) for callback in trainer.callbacks)

    cut = trainer.limit_train_batches != 1.0 or isinstance(trainer.limit_train_batches, int)
    refusals = (
        (
            not leaves_updates_to_torch(trainer),
            f"{strategy_name(trainer)} is not supported. Use one device, DDP, or ModelParallelStrategy (FSDP2).",
        ),
        (
            not pl_module.automatic_optimization,
            "manual optimization makes its own updates. Use automatic optimization, or draw the batches by "
            "BatchSteps.batch_at yourself.",
        ),
        (
            has(LargeBatchRegime),
            "LargeBatchRegime scales for one batch, and this callback for each. Leave one of them out.",
        ),
        (
            has(BatchSizeFinder),
            "BatchSizeFinder changes the batch after the plan. Call Tuner.scale_batch_size first, and pass what it "
            "finds as max_device_batch_size.",
        ),
        (has(GradientAccumulationScheduler), "GradientAccumulationScheduler changes the batch too. Leave it out."),
        (
            has(StochasticWeightAveraging),
            "StochasticWeightAveraging replaces the schedulers. Use WeightAveraging or EMAWeightAveraging.",
        ),
        (
            (cut or trainer.overfit_batches != 0) and not trainer.fast_dev_run,
            f"limit_train_batches={trainer.limit_train_batches} and overfit_batches={trainer.overfit_batches} cut the "
            "epoch in batches, whose size changes. Use a Subset of the data.",
        ),
        (
            trainer.reload_dataloaders_every_n_epochs > 0,
            f"reload_dataloaders_every_n_epochs={trainer.reload_dataloaders_every_n_epochs} may change the data of an "
            "epoch. Leave it 0.",
        ),
        (
            isinstance(interval, int) or (trainer.check_val_every_n_epoch is None and not by_time),
            f"val_check_interval={interval} counts batches, whose size changes. Give it as a share "
            "of an epoch, or leave it 1.0.",
        ),
        (
            adaptive and isinstance(interval, float) and interval != 1.0,
            f"val_check_interval={interval} is a share of an epoch whose batches are not known beforehand. Leave it "
            "1.0, or validate by time, as in val_check_interval='00:00:10:00'.",
        ),
        (
            has(BaseFinetuning),
            "BaseFinetuning adds parameter groups by the rate of the batch that runs. Put all groups into the "
            "optimizer in configure_optimizers, and freeze by requires_grad.",
        ),
        (
            trainer.accumulate_grad_batches > 1 and most is not None,
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} with max_device_batch_size={most} says twice "
            "how a batch is accumulated. Leave accumulate_grad_batches out.",
        ),
    )
    for refused, reason in refusals:
        if refused:
            raise MisconfigurationException(f"BatchSizeSchedule: {reason}")
