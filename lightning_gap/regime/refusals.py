"""Trainers, modules and optimizers that a large-batch regime cannot be right for, each refused with its remedy."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_gap.regime.fates import Rate
from lightning_gap.regime.plan import RegimePlan
from lightning_gap.regime.scaling import check_rule
from lightning_gap.trainer.internals.of_lightning import is_compiled_by_lightning
from lightning_gap.trainer.strategy import gradients_stay_scaled, leaves_updates_to_torch, strategy_name

__all__ = ["check_optimizers", "check_trainer", "keeps_lengths"]


def check_trainer(trainer: Any, pl_module: LightningModule, *, train_longer: bool, gradient_noise: bool) -> None:
    """Refuse the trainers and modules whose batch or updates cannot be planned."""
    shorter = "pass train_longer=False to scale the learning rate alone."
    averages = _has(trainer, StochasticWeightAveraging)
    refusals = (
        (
            not leaves_updates_to_torch(trainer),
            f"{strategy_name(trainer)} is not supported. Use one device, DDP, or ModelParallelStrategy (FSDP2).",
        ),
        (
            not pl_module.automatic_optimization and train_longer,
            "manual optimization steps its own optimizers and schedulers, so the trainer cannot count them as the "
            "reference run would. Apply a plan of your own, plan_regime(...).apply(optimizer, schedulers), and step "
            f"its clock; or {shorter}",
        ),
        (
            not pl_module.automatic_optimization and gradient_noise,
            "gradient_noise weights one backward pass a batch, and manual optimization may have several. Use automatic "
            "optimization.",
        ),
        (
            gradient_noise and is_compiled_by_lightning(pl_module),
            "gradient_noise cannot hook into a compiled LightningModule. Compile the network inside it instead.",
        ),
        (
            _has(trainer, BatchSizeFinder),
            "BatchSizeFinder changes the batch after the plan. Call Tuner.scale_batch_size first.",
        ),
        (
            _has(trainer, GradientAccumulationScheduler),
            "GradientAccumulationScheduler changes the batch during the run. Use Trainer(accumulate_grad_batches=...).",
        ),
        (
            averages and train_longer,
            "StochasticWeightAveraging replaces the schedulers at an epoch of its own. Use WeightAveraging or "
            f"EMAWeightAveraging, which average by updates, or {shorter}",
        ),
        (
            train_longer and _cuts_epochs(trainer),
            f"limit_train_batches={trainer.limit_train_batches} and overfit_batches={trainer.overfit_batches} cut the "
            f"epoch in batches, whose size differs from the reference run's. Use a Subset of the data, or {shorter}",
        ),
        (
            train_longer and trainer.reload_dataloaders_every_n_epochs > 0,
            f"reload_dataloaders_every_n_epochs={trainer.reload_dataloaders_every_n_epochs} may change the number of "
            f"updates in an epoch. Leave it 0, or {shorter}",
        ),
    )
    for refused, reason in refusals:
        if refused:
            raise MisconfigurationException(f"LargeBatchRegime: {reason}")
    if averages:
        rank_zero_warn("LargeBatchRegime: the swa_lrs of StochasticWeightAveraging are not scaled.")


def _cuts_epochs(trainer: Any) -> bool:
    limit = trainer.limit_train_batches  # 1 is one batch, 1.0 is all of them
    return isinstance(limit, int) or limit != 1.0 or trainer.overfit_batches != 0


def _has(trainer: Any, kind: type[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in trainer.callbacks)


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


def check_optimizers(trainer: Trainer, plan: RegimePlan) -> None:
    """Refuse the optimizers that the rule is not for, and those whose gradients cannot be clipped."""
    rule = plan.lr_rule if plan.rate is Rate.RULED else "none"
    for optimizer in trainer.optimizers:
        if not optimizer.param_groups:
            continue  # Lightning's stand-in for none
        try:
            doubt = check_rule(optimizer, rule, plan.ratio, plan.train_longer)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from None
        if doubt is not None:
            rank_zero_warn(f"LargeBatchRegime: {doubt}")
        if plan.clip_norm is not None and gradients_stay_scaled(trainer, optimizer):
            raise MisconfigurationException(
                f"clip_norm={plan.clip_norm} cannot clip for a fused {type(optimizer).__name__} with 16-bit mixed "
                "precision, which unscales gradients inside its step. Pass fused=False to it, or use bf16-mixed."
            )
