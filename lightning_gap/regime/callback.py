"""The callback that turns the regime of a small-batch reference run into the regime of the batch that really runs."""

from dataclasses import replace
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig
from rich.console import Console
from torch.optim.lr_scheduler import LRScheduler

from lightning_gap.parallel import holds_whole_weights, strategy_name
from lightning_gap.regime.batch import Pass, effective_batch_size, pass_over_data
from lightning_gap.regime.plan import RegimePlan, plan_regime, updates_in_epoch
from lightning_gap.regime.scaling import LR_RULES, RULED_OPTIMIZERS, LRRule, lr_factor, rule_name, scale_optimizer
from lightning_gap.regime.schedules import ReferenceClock, horizons, scale_scheduler

__all__ = ["LargeBatchRegime"]

# A frequency that no epoch has as many batches as, so Lightning itself never steps the scheduler.
_NEVER = 2**62


class LargeBatchRegime(Callback):
    r"""Train at a large batch by the regime of a small-batch reference run: scale the learning rate, train longer.

    Write the regime of the reference run: its learning rate, its schedulers and ``Trainer(max_epochs=...)``, as for one
    device at the batch ``reference_batch_size`` without accumulation. The callback turns it into the regime of the
    batch that runs, :math:`|B_L|` = loader's batch × accumulation × data-parallel replicas:

    .. math:: \eta_L(t) = f(|B_L| / |B_S|) \; \eta_S(t), \qquad t = 1, \dots, T_L = T_S,

    in updates t: with ``train_longer`` the run makes exactly as many updates as the reference run, and its learning
    rate at every update is the factor times the reference run's at the same update, whatever the scheduler. To that
    end a scheduler that Lightning would step every epoch is stepped when a *reference* epoch of updates is over;
    schedulers stepped every update are in updates already. Sizes taken from ``trainer.estimated_stepping_batches``
    are right; ``trainer.max_epochs`` is this run's own number while it fits, so size an epoch schedule by the
    reference run's number itself. ``EarlyStopping``, validation and checkpoints keep counting this run's epochs.

    Args:
        reference_batch_size: Samples per update of the reference run, :math:`|B_S|`.
        batch_size: Samples per update of this run over all devices, accumulation included, :math:`|B_L|`. Default:
            :func:`effective_batch_size`. Needed only where the loader does not tell.
        lr_rule: ``"sqrt"`` (Hoffer et al.), ``"linear"`` (Goyal et al.), ``"none"``, or a callable from the ratio
            :math:`|B_L| / |B_S|` to the factor. The first two are rules for SGD, other optimizers are refused.
        train_longer: Whether to make as many updates as the reference run. If not, epochs and schedulers stay as they
            are and only the learning rate is scaled.

    Attributes:
        plan: The :class:`RegimePlan` of the latest fit.

    Raises:
        TypeError: If a batch size is not an int.
        ValueError: If a batch size is not positive or the rule is unknown.
        MisconfigurationException: When ``fit`` starts, before anything is changed, if the trainer, the module, its
            optimizer, a scheduler or the loader is one that this regime cannot be right for. Also on resuming a
            checkpoint of another regime, or of a run without this callback.

    References:
        Hoffer, Hubara, Soudry 2017, "Train longer, generalize better", sections 4 and 5.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> regime = LargeBatchRegime(reference_batch_size=4)
        >>> trainer = Trainer(
        ...     max_epochs=3, accelerator="cpu", callbacks=[regime], logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> data = torch.utils.data.DataLoader(torch.randn(60, 32), batch_size=16)
        >>> trainer.fit(BoringModel(), data)  # doctest: +ELLIPSIS
        Large-batch regime...
        >>> trainer.global_step == 3 * 60 // 4
        True
    """

    def __init__(
        self,
        reference_batch_size: int,
        *,
        batch_size: int | None = None,
        lr_rule: LRRule = "sqrt",
        train_longer: bool = True,
    ) -> None:
        self.reference_batch_size = _positive_int("reference_batch_size", reference_batch_size)
        self.batch_size = None if batch_size is None else _positive_int("batch_size", batch_size)
        if not callable(lr_rule) and lr_rule not in LR_RULES:
            lr_factor(lr_rule, 1.0)  # raises, naming the rules there are
        self.lr_rule = lr_rule
        self.train_longer = train_longer
        self.plan: RegimePlan | None = None
        self._pass: Pass | None = None
        self._clocks: list[ReferenceClock] = []
        self._ticked: int | None = None  # up to which update the clocks have been read
        self._fitting = False
        self._limits: tuple[int | None, int, int] | None = None  # the user's, while ours are in their place

    # ------------------------------------------------------------------ plan

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Plan the regime and set the limits of epochs and updates; before ``configure_optimizers`` reads them."""
        if stage != "fit" or _tuning(trainer):
            return
        train_longer = self.train_longer
        if cast(Any, trainer).fast_dev_run:
            rank_zero_warn("fast_dev_run: LargeBatchRegime scales the learning rate and leaves the length as it is.")
            train_longer = False
        _check_trainer(cast(Any, trainer), pl_module, scales=self.lr_rule != "none", train_longer=train_longer)
        self._fitting, self._ticked, self._clocks = True, None, []
        self._pass = pass_over_data(trainer) if train_longer else None
        self.plan = self._plan(trainer)
        if train_longer:
            self._set_limits(trainer, self.plan)

    def _plan(self, trainer: Trainer) -> RegimePlan:
        batch_size = self.batch_size or effective_batch_size(trainer)
        factor = lr_factor(self.lr_rule, batch_size / self.reference_batch_size)
        if self._pass is None:
            return RegimePlan(self.reference_batch_size, batch_size, rule_name(self.lr_rule), factor)
        if batch_size != effective_batch_size(trainer):
            raise MisconfigurationException(
                f"batch_size={batch_size} is not what an update of this trainer sees, {effective_batch_size(trainer)} "
                "samples (loader's batch x accumulation x replicas). Leave batch_size out, or pass train_longer=False."
            )
        reference_updates = updates_in_epoch(
            self._pass.samples, self.reference_batch_size, drop_last=self._pass.drop_last
        )
        epochs = trainer.fit_loop.max_epochs
        try:
            return plan_regime(
                reference_batch_size=self.reference_batch_size,
                batch_size=batch_size,
                lr_rule=rule_name(self.lr_rule),
                lr_factor=factor,
                reference_updates_per_epoch=reference_updates,
                updates_per_epoch=updates_in_epoch(self._pass.batches, trainer.accumulate_grad_batches),
                max_epochs=None if epochs in (None, -1) else epochs,
                max_steps=None if trainer.max_steps == -1 else trainer.max_steps,
                min_epochs=trainer.fit_loop.min_epochs or 0,
            )
        except ValueError as error:
            raise MisconfigurationException(f"LargeBatchRegime cannot plan this run: {error}") from error

    def _set_limits(self, trainer: Trainer, plan: RegimePlan) -> None:
        loop = trainer.fit_loop
        self._limits = (loop.max_epochs, loop.min_epochs or 0, loop.epoch_loop.max_steps)
        loop.min_epochs = plan.min_epochs
        if plan.epochs is not None:
            loop.max_epochs = plan.epochs
        loop.epoch_loop.max_steps = plan.max_steps

    def _release(self, trainer: Trainer) -> None:
        self._fitting = False
        if self._limits is not None:
            loop = trainer.fit_loop
            loop.max_epochs, loop.min_epochs, loop.epoch_loop.max_steps = self._limits
            self._limits = None

    # ---------------------------------------------------------------- change

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scale the learning rates and take over the schedulers' clocks; before a checkpoint is restored over them."""
        plan = _planned(self.plan)
        if self._limits is not None:
            # With max_steps set, Lightning resumes from the end of an epoch by one stray batch of that epoch. So it is
            # set while configure_optimizers may read it, and again once a checkpoint is restored.
            trainer.fit_loop.epoch_loop.max_steps = -1
        configs = trainer.lr_scheduler_configs
        _check_optimizers(trainer, pl_module, plan, ruled=isinstance(self.lr_rule, str))
        before = _learning_rates(trainer)
        if plan.lr_factor != 1.0:
            for optimizer in trainer.optimizers:
                scale_optimizer(optimizer, plan.lr_factor)
            for config in configs:
                scale_scheduler(config.scheduler, plan.lr_factor)
        self._clocks = [_take_clock(config, plan) for config in configs if _reclocked(config, plan)]
        # Within one update, Lightning steps the schedulers of every update before those of every epoch.
        self._clocks.sort(key=lambda clock: clock.interval == "epoch")
        taken = {id(clock.scheduler): clock for clock in self._clocks}
        self.plan = replace(
            plan,
            learning_rates=tuple(zip(before, _learning_rates(trainer), strict=True)),
            schedulers=tuple(_fate(config, taken.get(id(config.scheduler))) for config in configs),
        )
        self._report(trainer, self.plan)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the loaded data is what was planned for, and take the clock up where a checkpoint left it."""
        plan = _planned(self.plan)
        if self._pass is not None:
            found = (trainer.num_training_batches, effective_batch_size(trainer))
            if found != (self._pass.batches, plan.batch_size):
                raise MisconfigurationException(
                    f"LargeBatchRegime planned for {self._pass.batches} training batches an epoch and "
                    f"{plan.batch_size} samples an update, but there are {found[0]} and {found[1]}. The loader or "
                    "accumulate_grad_batches changed after setup: set both before fit, or pass train_longer=False."
                )
        if self._limits is not None:
            loop = trainer.fit_loop
            loop.epoch_loop.max_steps = plan.max_steps
            epochs = plan.epochs_from(trainer.current_epoch, trainer.global_step)
            if plan.epochs is not None and epochs > plan.epochs:
                # The checkpoint is of a shorter run, whose last epoch was cut short and is not taken up again.
                loop.max_epochs, loop.epoch_loop.max_steps = epochs, cast(int, plan.updates)
        if self._ticked is None:
            self._ticked = trainer.global_step
        self._tick(trainer.global_step)

    @rank_zero_only
    def _report(self, trainer: Trainer, plan: RegimePlan) -> None:
        Console().print(plan.table())
        for logger in trainer.loggers:
            logger.log_hyperparams({f"lightning_gap/regime/{key}": value for key, value in plan.to_dict().items()})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Step the schedulers that the reference run would step after this update."""
        plan = _planned(self.plan)
        self._tick(trainer.global_step)
        if trainer.global_step == trainer.max_steps and plan.ends_with_reference_epoch:
            # max_steps alone would end the run without the validation that ends the reference run's last epoch.
            trainer.should_stop = True

    def _tick(self, update: int) -> None:
        for passed in range(cast(int, self._ticked) + 1, update + 1):
            for clock in self._clocks:
                if clock.due(passed):
                    clock.scheduler.step()
        self._ticked = update

    # ----------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """Return the plan and the latest update whose schedulers were stepped, as plain Python."""
        return {} if self.plan is None else {"plan": self.plan.to_dict(), "ticked": self._ticked}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a checkpoint is of this regime and take up its clock.

        Args:
            state_dict: What :meth:`state_dict` returned when the checkpoint was written.
        """
        if not self._fitting:
            return
        plan = _planned(self.plan)
        differences = plan.disagreements(state_dict["plan"])
        if differences:
            raise MisconfigurationException(
                f"The checkpoint is of another regime: {'; '.join(differences)}. Resume with the same batch size, "
                "accumulation, replicas and LargeBatchRegime arguments, or start a new run from its weights."
            )
        self._ticked = state_dict["ticked"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume a run that was not of this regime: its learning rates would silently win."""
        if not self._fitting:
            return
        plan = _planned(self.plan)
        if (plan.lr_factor != 1.0 or plan.reclocked) and self.state_key not in checkpoint.get("callbacks", {}):
            raise MisconfigurationException(
                "The checkpoint was written without LargeBatchRegime, so its learning rates and schedulers are not "
                "scaled and would be restored over the scaled ones. Resume without the callback, or start a new run "
                "from its weights."
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the trainer the user's limits back."""
        self._release(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the trainer the user's limits back after an exception, for there is no teardown then."""
        self._release(trainer)


def _positive_int(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be an int: the samples of one update over all devices.")
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1: the samples of one update over all devices.")
    return value


def _learning_rates(trainer: Trainer) -> list[float]:
    return [float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups]


def _planned(plan: RegimePlan | None) -> RegimePlan:
    assert plan is not None, "setup precedes every other hook of fit"
    return plan


def _tuning(trainer: Any) -> bool:
    """Whether ``Tuner.scale_batch_size`` runs: it ends before training, and the fit that follows plans anew."""
    return any(isinstance(callback, BatchSizeFinder) and callback._early_exit for callback in trainer.callbacks)


def _check_trainer(trainer: Any, pl_module: LightningModule, *, scales: bool, train_longer: bool) -> None:
    """Refuse what the regime cannot be right for, each with its remedy."""
    shorter = "pass train_longer=False to scale the learning rate alone."
    limit = trainer.limit_train_batches  # 1 is one batch, 1.0 is all of them
    found = {type(callback) for callback in trainer.callbacks}

    def has(kind: type[Callback]) -> bool:
        return any(issubclass(callback, kind) for callback in found)

    refusals = (
        (
            not pl_module.automatic_optimization,
            "manual optimization steps its own optimizers and schedulers. Use automatic optimization.",
        ),
        (
            not holds_whole_weights(trainer),
            f"{strategy_name(trainer)} is not supported yet. Use one device or DDP.",
        ),
        (has(BatchSizeFinder), "BatchSizeFinder changes the batch after the plan. Call Tuner.scale_batch_size first."),
        (
            has(LearningRateFinder) and scales,
            "LearningRateFinder finds the learning rate of the batch that runs, which must not be scaled again. Pass "
            'lr_rule="none", or find the rate at the reference batch without this callback.',
        ),
        (
            has(GradientAccumulationScheduler),
            "GradientAccumulationScheduler changes the batch during the run. Use Trainer(accumulate_grad_batches=...).",
        ),
        (
            has(StochasticWeightAveraging) and train_longer,
            f"StochasticWeightAveraging replaces the schedulers at an epoch of its own. Leave it out, or {shorter}",
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
    for kind in (EarlyStopping, BaseFinetuning):
        if train_longer and has(kind):
            rank_zero_warn(f"LargeBatchRegime: {kind.__name__} counts epochs of this run, not of the reference run.")


def _check_optimizers(trainer: Trainer, pl_module: LightningModule, plan: RegimePlan, *, ruled: bool) -> None:
    """Refuse the optimizers and schedulers that cannot be matched, before any is changed."""
    if plan.lr_factor != 1.0:
        for optimizer in trainer.optimizers:
            if ruled and not isinstance(optimizer, RULED_OPTIMIZERS):
                raise MisconfigurationException(
                    f'lr_rule="{plan.lr_rule}" is a rule for SGD, and the optimizer is {type(optimizer).__name__}. '
                    'Pass lr_rule="none", or a callable ratio -> factor to decide the factor yourself.'
                )
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
        if plan.train_longer and config.reduce_on_plateau:
            raise MisconfigurationException(
                f"{name} follows a metric, not the updates, so it cannot follow the reference run. Use a scheduler of "
                "fixed steps, or pass train_longer=False."
            )
        if _reclocked(config, plan):
            _check_reclocked(config, pl_module, plan)


def _check_reclocked(config: LRSchedulerConfig, pl_module: LightningModule, plan: RegimePlan) -> None:
    name = type(config.scheduler).__name__
    if is_overridden("lr_scheduler_step", pl_module):
        raise MisconfigurationException(
            f"{type(pl_module).__name__}.lr_scheduler_step is overridden, so {name} cannot be stepped on the reference "
            'run\'s epochs. Remove the override, use interval="step" with frequency 1, or pass train_longer=False.'
        )
    if config.interval != "epoch" or plan.reference_epochs is None or not isinstance(config.scheduler, LRScheduler):
        return
    for attribute, steps in horizons(config.scheduler).items():
        advice = (
            f"{attribute}={steps} reaches past the reference run's {plan.reference_epochs} epochs. It counts epochs of "
            f"the reference run: write {plan.reference_epochs} if it was taken from trainer.max_epochs, which is this "
            "run's number while it fits."
        )
        if steps == plan.epochs and steps > plan.reference_epochs:
            raise MisconfigurationException(advice)
        if steps > plan.reference_epochs:
            rank_zero_warn(advice)


def _reclocked(config: LRSchedulerConfig, plan: RegimePlan) -> bool:
    """Whether Lightning would step a scheduler by this run's epochs."""
    return plan.reclocked and (config.interval == "epoch" or config.frequency > 1)


def _take_clock(config: LRSchedulerConfig, plan: RegimePlan) -> ReferenceClock:
    """Take a scheduler out of Lightning's hands; it stays in its lists, so it is saved, restored and monitored."""
    clock = ReferenceClock(
        config.scheduler,
        "step" if config.interval == "step" else "epoch",
        config.frequency,
        cast(int, plan.reference_updates_per_epoch),
    )
    config.interval, config.frequency = "step", _NEVER
    return clock


def _fate(config: LRSchedulerConfig, clock: ReferenceClock | None) -> str:
    name = type(config.scheduler).__name__
    if clock is None:
        return f"{name}: every {config.frequency} {config.interval}(s), as it was"
    if clock.interval == "epoch":
        return (
            f"{name}: every {clock.frequency * clock.updates_per_epoch} updates ({clock.frequency} reference epoch(s))"
        )
    return f"{name}: every {clock.frequency} updates of a reference epoch"
