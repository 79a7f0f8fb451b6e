"""What a large-batch regime cannot be right for, each refused before anything is changed, with its remedy."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_gap.parallel import gradients_stay_scaled, leaves_updates_to_torch, strategy_name
from lightning_gap.regime.plan import RegimePlan
from lightning_gap.regime.scaling import ADAPTIVE_OPTIMIZERS, RULED_OPTIMIZERS, check_moments
from lightning_gap.regime.schedules import horizons, unread_parts

__all__ = ["check_optimizers", "check_schedulers", "check_trainer", "sized_from_trainer"]


def check_trainer(trainer: Any, pl_module: LightningModule, *, train_longer: bool, gradient_noise: bool) -> None:
    """Refuse the trainers and modules whose batch or updates cannot be planned.

    Args:
        trainer: The trainer, in ``setup``.
        pl_module: Its module.
        train_longer: Whether the run is to make more updates than its epochs have.
        gradient_noise: Whether samples are to be weighted.
    """
    shorter = "pass train_longer=False to scale the learning rate alone."
    limit = trainer.limit_train_batches  # 1 is one batch, 1.0 is all of them
    averages = _has(trainer, StochasticWeightAveraging)
    refusals = (
        (
            not leaves_updates_to_torch(trainer),
            f"{strategy_name(trainer)} is not supported. Use one device, DDP, or ModelParallelStrategy (FSDP2).",
        ),
        (
            not pl_module.automatic_optimization and train_longer,
            "manual optimization steps its own optimizers and schedulers, so the trainer cannot count them as the "
            f"reference run would. Multiply max_epochs and your schedules yourself, and {shorter}",
        ),
        (
            not pl_module.automatic_optimization and gradient_noise,
            "gradient_noise weights one backward pass a batch, and manual optimization may have several. Use automatic "
            "optimization.",
        ),
        (
            gradient_noise and getattr(pl_module, "_compiler_ctx", None) is not None,
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
            train_longer and (isinstance(limit, int) or limit != 1.0 or trainer.overfit_batches != 0),
            f"limit_train_batches={limit} and overfit_batches={trainer.overfit_batches} cut the "
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


def _has(trainer: Any, kind: type[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in trainer.callbacks)


def check_optimizers(trainer: Trainer, plan: RegimePlan) -> None:
    """Refuse the optimizers that the rule is not for, and those whose gradients cannot be clipped.

    Args:
        trainer: The trainer, with its optimizers configured and untouched.
        plan: The plan of the run.
    """
    for optimizer in trainer.optimizers:
        if plan.ratio != 1.0:
            _check_rule(optimizer, plan)
        if plan.clip_norm is not None and gradients_stay_scaled(trainer, optimizer):
            raise MisconfigurationException(
                f"clip_norm={plan.clip_norm} cannot clip for a fused {type(optimizer).__name__} with 16-bit mixed "
                "precision, which unscales gradients inside its step. Pass fused=False to it, or use bf16-mixed."
            )


def _check_rule(optimizer: Optimizer, plan: RegimePlan) -> None:
    name = type(optimizer).__name__
    if plan.lr_rule not in RULED_OPTIMIZERS or isinstance(optimizer, RULED_OPTIMIZERS[plan.lr_rule]):
        if plan.lr_rule == "adam":
            try:
                check_moments(optimizer, plan.ratio)
            except ValueError as error:
                raise MisconfigurationException(
                    f'{error} Use a smaller batch, or lr_rule="sqrt", which scales the learning rate alone.'
                ) from None
        return
    if plan.lr_rule == "sqrt" and isinstance(optimizer, ADAPTIVE_OPTIMIZERS):
        rank_zero_warn(
            f'LargeBatchRegime: lr_rule="sqrt" scales the learning rate of {name}, and leaves its betas and eps as '
            'they are. lr_rule="adam" scales these too, for ratio * (1 - beta) < 0.5.'
        )
        return
    ruled = " or ".join(kind.__name__ for kind in RULED_OPTIMIZERS[plan.lr_rule])
    raise MisconfigurationException(
        f'lr_rule="{plan.lr_rule}" is a rule for {ruled}, and the optimizer is {name}. Pass lr_rule="none", or a '
        "callable ratio -> factor to decide the factor yourself."
    )


def check_schedulers(trainer: Trainer, pl_module: LightningModule, plan: RegimePlan, stretch: str | bool) -> None:
    """Refuse the schedulers that cannot be matched, and warn of the doubtful ones.

    Args:
        trainer: The trainer, with its schedulers configured and untouched.
        pl_module: Its module.
        plan: The plan of the run.
        stretch: The argument ``stretch_schedulers``.
    """
    for config in trainer.lr_scheduler_configs:
        name = type(config.scheduler).__name__
        if plan.lr_factor != 1.0 and not isinstance(config.scheduler, LRScheduler):
            raise MisconfigurationException(
                f"{name} is not a torch LRScheduler, so its learning rates are unknown. Use one, or pass "
                'lr_rule="none".'
            )
        if plan.lr_factor != 1.0 and not type(config.scheduler).__module__.startswith("torch.optim."):
            rank_zero_warn(
                f"LargeBatchRegime scales base_lrs, max_lrs, min_lrs and eta_min of {name}, a scheduler of your own; a "
                "learning rate that it keeps by another name is not scaled."
            )
        if plan.train_longer and plan.updates_per_epoch is None and config.interval == "epoch":
            raise MisconfigurationException(
                f"{name} is stepped every epoch, and the loader does not tell how many updates an epoch has. Use "
                'interval="step", or a loader with a length.'
            )
        if plan.reclocked and stretch and not sized_from_trainer(config, plan, stretch):
            _check_stretched(config, pl_module, plan)
            if stretch == "auto":
                _warn_of_unread_length(config, plan)


def _check_stretched(config: LRSchedulerConfig, pl_module: LightningModule, plan: RegimePlan) -> None:
    name = type(config.scheduler).__name__
    by_epoch = config.interval == "epoch"
    if config.reduce_on_plateau and not by_epoch and (config.frequency > 1 or plan.pace != 1):
        raise MisconfigurationException(
            f"{name} with interval={config.interval!r} and frequency={config.frequency} looks at its metric by batches "
            'of this run. Use interval="epoch", or stretch_schedulers=False to leave it so.'
        )
    if config.reduce_on_plateau or not (by_epoch or config.frequency > 1 or plan.pace != 1):
        return
    if is_overridden("lr_scheduler_step", pl_module):
        raise MisconfigurationException(
            f"{type(pl_module).__name__}.lr_scheduler_step is overridden, so {name} cannot be stepped on the reference "
            'run\'s epochs. Remove the override, use interval="step" with frequency 1, or pass train_longer=False.'
        )
    if by_epoch and plan.reference_epochs is not None and isinstance(config.scheduler, LRScheduler):
        for attribute, steps in horizons(config.scheduler).items():
            if steps > plan.reference_epochs:
                rank_zero_warn(
                    f"{attribute}={steps} reaches past the reference run's {plan.reference_epochs} epochs, and "
                    "LargeBatchRegime takes it for epochs of the reference run. If it counts epochs of this run, pass "
                    "stretch_schedulers=False."
                )


def _warn_of_unread_length(config: LRSchedulerConfig, plan: RegimePlan) -> None:
    here, there = _lengths(config, plan)
    unread = unread_parts(config.scheduler) if isinstance(config.scheduler, LRScheduler) else []
    if here is None or here == there or not unread:
        return
    unit = "epochs" if config.interval == "epoch" else "updates"
    rank_zero_warn(
        f"LargeBatchRegime cannot read the length of {' and '.join(unread)}, which a function may hide, and takes it "
        f"for the reference run's, {there} {unit}. If it comes from the trainer, whose max_epochs and "
        f"estimated_stepping_batches are this run's ({here} {unit}), pass stretch_schedulers=False; pass "
        "stretch_schedulers=True if it is the reference run's."
    )


def _lengths(config: LRSchedulerConfig, plan: RegimePlan) -> tuple[int | None, int | None]:
    """Return how long this run and the reference run are, in the steps that a scheduler counts."""
    if config.interval == "epoch":
        return plan.epochs, plan.reference_epochs
    return plan.updates, plan.reference_updates


def sized_from_trainer(config: LRSchedulerConfig, plan: RegimePlan, stretch: str | bool) -> bool:
    """Return whether a scheduler has this run's length already, and is not to be stretched.

    That is what ``stretch_schedulers=False`` declares of all. ``"auto"`` recognises a length that is this run's number
    of epochs or updates and not the reference run's: it was taken from ``trainer.max_epochs`` or
    ``trainer.estimated_stepping_batches``.

    Args:
        config: Lightning's description of the scheduler.
        plan: The plan of the run.
        stretch: The argument ``stretch_schedulers``.
    """
    if stretch != "auto":
        return not stretch
    scheduler: Any = config.scheduler
    if not isinstance(scheduler, LRScheduler):
        return False
    here, there = _lengths(config, plan)
    return here is not None and here != there and here in horizons(scheduler).values()
