"""Trainers and modules whose batches or updates cannot be planned, in one table for the callbacks that plan them."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_gap.trainer.internals.of_lightning import ends_tuning, is_compiled_by_lightning, validation_seconds
from lightning_gap.trainer.strategy import leaves_updates_to_torch, strategy_name

__all__ = ["check_regime_trainer", "check_schedule_trainer", "is_tuning", "keeps_lengths"]


class _Refusal(NamedTuple):
    """What is found in a trainer, why that cannot be, and the remedy of each callback that refuses it."""

    found: bool
    why: str
    regime: str | None = None  # of LargeBatchRegime; None where it takes it
    schedule: str | None = None  # of BatchSizeSchedule


def check_regime_trainer(trainer: Any, pl_module: LightningModule, *, train_longer: bool, gradient_noise: bool) -> None:
    """Refuse what ``LargeBatchRegime`` cannot be right for."""
    refusals = _refusals(trainer, pl_module, train_longer=train_longer, gradient_noise=gradient_noise)
    _refuse("LargeBatchRegime", ((each.found, each.why, each.regime) for each in refusals))
    if _has(trainer, StochasticWeightAveraging):
        rank_zero_warn("LargeBatchRegime: the swa_lrs of StochasticWeightAveraging are not scaled.")


def check_schedule_trainer(
    trainer: Any, pl_module: LightningModule, most: int | None, *, adaptive: bool, beside_regime: bool
) -> None:
    """Refuse what ``BatchSizeSchedule`` cannot be right for."""
    refusals = _refusals(trainer, pl_module, most=most, adaptive=adaptive, beside_regime=beside_regime)
    _refuse("BatchSizeSchedule", ((each.found, each.why, each.schedule) for each in refusals))


def _refuse(whom: str, refusals: Iterable[tuple[bool, str, str | None]]) -> None:
    for found, why, remedy in refusals:
        if found and remedy is not None:
            raise MisconfigurationException(f"{whom}: {why}{remedy}")


def _refusals(
    trainer: Any,
    pl_module: LightningModule,
    *,
    train_longer: bool = False,
    gradient_noise: bool = False,
    most: int | None = None,
    adaptive: bool = False,
    beside_regime: bool = False,
) -> tuple[_Refusal, ...]:
    """Return the table; the first that is found, and refused by a callback, is what it says."""
    strategies = " Use one device, DDP, or ModelParallelStrategy (FSDP2)."
    shorter = "or pass train_longer=False to scale the learning rate alone."
    by_time = validation_seconds(trainer) is not None
    interval = None if by_time else trainer.val_check_interval

    def longer(remedy: str) -> str | None:
        return f"{remedy}{shorter}" if train_longer else None

    return (
        _Refusal(
            not leaves_updates_to_torch(trainer), f"{strategy_name(trainer)} is not supported.", strategies, strategies
        ),
        _Refusal(
            not pl_module.automatic_optimization,
            "manual optimization ",
            longer(
                "steps its own optimizers and schedulers, so the trainer cannot count them as the reference run would. "
                "Apply a plan of your own, plan_regime(...).apply(optimizer, schedulers), and step its clock; "
            ),
            "makes its own updates. Use automatic optimization, or draw the batches by BatchSteps.batch_at yourself.",
        ),
        _Refusal(
            not pl_module.automatic_optimization and gradient_noise,
            "gradient_noise weights one backward pass a batch, and manual optimization may have several.",
            " Use automatic optimization.",
        ),
        _Refusal(
            gradient_noise and is_compiled_by_lightning(pl_module),
            "gradient_noise cannot hook into a compiled LightningModule.",
            " Compile the network inside it instead.",
        ),
        _Refusal(
            beside_regime,
            "LargeBatchRegime scales for one batch, and this callback for each.",
            schedule=" Leave one of them out.",
        ),
        _Refusal(
            _has(trainer, BatchSizeFinder),
            "BatchSizeFinder changes the batch after the plan. Call Tuner.scale_batch_size first",
            ".",
            ", and pass what it finds as max_device_batch_size.",
        ),
        _Refusal(
            _has(trainer, GradientAccumulationScheduler),
            "GradientAccumulationScheduler changes the batch ",
            "during the run. Use Trainer(accumulate_grad_batches=...).",
            "too. Leave it out.",
        ),
        _Refusal(
            _has(trainer, StochasticWeightAveraging),
            "StochasticWeightAveraging replaces the schedulers",
            longer(" at an epoch of its own. Use WeightAveraging or EMAWeightAveraging, which average by updates, "),
            ". Use WeightAveraging or EMAWeightAveraging.",
        ),
        _Refusal(
            _cuts_epochs(trainer) and not trainer.fast_dev_run,
            f"limit_train_batches={trainer.limit_train_batches} and overfit_batches={trainer.overfit_batches} cut the "
            "epoch in batches, whose size ",
            longer("differs from the reference run's. Use a Subset of the data, "),
            "changes. Use a Subset of the data.",
        ),
        _Refusal(
            trainer.reload_dataloaders_every_n_epochs > 0,
            f"reload_dataloaders_every_n_epochs={trainer.reload_dataloaders_every_n_epochs} may change the ",
            longer("number of updates in an epoch. Leave it 0, "),
            "data of an epoch. Leave it 0.",
        ),
        _Refusal(
            isinstance(interval, int) or (trainer.check_val_every_n_epoch is None and not by_time),
            f"val_check_interval={interval} counts batches, whose size changes.",
            schedule=" Give it as a share of an epoch, or leave it 1.0.",
        ),
        _Refusal(
            adaptive and isinstance(interval, float) and interval != 1.0,
            f"val_check_interval={interval} is a share of an epoch whose batches are not known beforehand.",
            schedule=" Leave it 1.0, or validate by time, as in val_check_interval='00:00:10:00'.",
        ),
        _Refusal(
            _has(trainer, BaseFinetuning),
            "BaseFinetuning adds parameter groups by the rate of the batch that runs.",
            schedule=" Put all groups into the optimizer in configure_optimizers, and freeze by requires_grad.",
        ),
        _Refusal(
            trainer.accumulate_grad_batches > 1 and most is not None,
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} with max_device_batch_size={most} says twice "
            "how a batch is accumulated.",
            schedule=" Leave accumulate_grad_batches out.",
        ),
    )


def is_tuning(trainer: Any) -> bool:
    """Return whether a method of ``Tuner`` runs: it ends before training, and the fit that follows plans anew."""
    return any(
        isinstance(callback, (BatchSizeFinder, LearningRateFinder)) and ends_tuning(callback)
        for callback in trainer.callbacks
    )


def keeps_lengths(trainer: Any, pl_module: LightningModule) -> bool:
    """Return whether the lengths of a run that is not to be trained longer are its own.

    So they are where the updates of an epoch cannot be told, or something else changes them or the schedulers.
    """
    return bool(
        not pl_module.automatic_optimization
        or _has(trainer, StochasticWeightAveraging)
        or _cuts_epochs(trainer)
        or trainer.reload_dataloaders_every_n_epochs > 0
    )


def _cuts_epochs(trainer: Any) -> bool:
    limit = trainer.limit_train_batches  # 1 is one batch, 1.0 is all of them
    return isinstance(limit, int) or limit != 1.0 or trainer.overfit_batches != 0


def _has(trainer: Any, kind: type[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in trainer.callbacks)
