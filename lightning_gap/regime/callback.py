"""The callback that turns the regime of a small-batch reference run into the regime of the batch that really runs."""

import math
from dataclasses import replace
from typing import Any, Literal, cast
from weakref import WeakSet

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer

from lightning_gap.arguments import check_count
from lightning_gap.loggers import define_axes, filled, log_facts, log_table
from lightning_gap.parallel import clip_gradients, data_parallel_rank, from_rank_zero, require_lightning
from lightning_gap.regime.batch import DataNotReady, Pass, effective_batch_size, pass_over_data
from lightning_gap.regime.checks import check_optimizers, check_schedulers, check_trainer, sized_from_trainer
from lightning_gap.regime.companions import NEVER, EpochCounter, epoch_counters, warn_of_other_counters
from lightning_gap.regime.noise import SampleNoise, noise_variance, output_module
from lightning_gap.regime.plan import PLAN_COLUMNS, RegimePlan, plan_regime, updates_in_epoch
from lightning_gap.regime.scaling import LR_RULES, LRRule, lr_factor, rule_name, scale_moments, scale_optimizer
from lightning_gap.regime.schedules import ReferenceClock, scale_momentums, scale_scheduler
from lightning_gap.regime.warmup import Warmup
from lightning_gap.terminal import say

__all__ = ["LargeBatchRegime"]

_PREFIX = "lightning_gap/regime/"
# The rule of a learning rate that LearningRateFinder has found at the batch that runs.
_FOUND = "found"
# What has been scaled: a module that keeps its optimizer must not have it scaled again in its next fit.
_scaled: WeakSet[Optimizer] = WeakSet()


class LargeBatchRegime(Callback):
    r"""Train at a large batch by the regime of a small-batch reference run: scale the learning rate, train longer.

    Write the regime of the reference run: its learning rate, its schedulers and ``Trainer(max_epochs=...)``, as for one
    device at the batch ``reference_batch_size`` without accumulation. The callback turns it into the regime of the
    batch that runs, :math:`|B_L|` = loader's batch × accumulation × data-parallel replicas:

    .. math:: \eta_L(t) = f(|B_L| / |B_S|) \; \eta_S(t), \qquad t = 1, \dots, T_L = T_S,

    in updates t: with ``train_longer`` the run makes exactly as many updates as the reference run, and its learning
    rate at every update is the factor times the reference run's at the same update, whatever the scheduler. To that
    end whatever Lightning does every epoch waits until a *reference* epoch of updates is over: schedulers are stepped
    right then; validation, early stopping, ``ReduceLROnPlateau`` and the checkpoints of ``ModelCheckpoint`` at the end
    of this run's epoch in which it falls. Schedulers stepped every update are in updates already.

    What it did is printed before training as a table and logged as hyperparameters; ``updates``,
    ``samples_seen``, ``learning_rate``, ``lr_over_batch`` and ``clipped_fraction`` are logged under
    ``lightning_gap/regime/`` at every update, of which the loggers get one in ``log_every_n_steps``.

    Args:
        reference_batch_size: Samples per update of the reference run, :math:`|B_S|`.
        batch_size: Samples per update of this run over all devices, accumulation included, :math:`|B_L|`. Default:
            :func:`effective_batch_size`. Needed only where the loader does not tell.
        lr_rule: ``"sqrt"`` (Hoffer et al.), ``"linear"`` (Goyal et al.), ``"adam"`` (Malladi et al.: √ratio, and the
            moments' 1 − β and ε with it), ``"none"``, or a callable from the ratio :math:`|B_L| / |B_S|` to the
            factor.
        train_longer: Whether to make as many updates as the reference run, or how far to go from its epochs, 0, to its
            updates, 1. At 0 or ``False`` epochs and schedulers stay as they are.
        stretch_schedulers: ``True`` takes every scheduler's lengths for the reference run's, ``False`` for this run's.
            ``"auto"`` takes those for this run's that are its number of epochs or updates, as
            ``trainer.max_epochs`` and ``trainer.estimated_stepping_batches`` give them, all others for the reference
            run's.
        clip_norm: Clip the L2 norm of each optimizer's gradients to this (5 in the paper). ``None``: do not.
        clip_updates: Clip in this many first updates only. ``None``: in all.
        warmup_updates: In how many updates the learning rate grows from the reference run's to the scaled one,
            linearly, under whatever schedule runs.
        gradient_noise: Instead of a larger learning rate, weight each sample's gradient by
            :math:`z_n \sim N(1, |B_L| / |B_S| - 1)`, which gives the large batch the gradient noise of the small one.
            ``True``, or the name of the last module before the loss. Needs ``lr_rule="none"``.

    Attributes:
        plan: The :class:`RegimePlan` of the latest fit.

    Raises:
        TypeError: If a batch size or a number of updates is not an int.
        ValueError: If an argument is out of its range, or does not go with another.
        MisconfigurationException: When ``fit`` starts, before anything is changed, if the trainer, the module, its
            optimizer, a scheduler or the loader is one that this regime cannot be right for; so is an optimizer
            that an earlier fit in this process has scaled, on resuming from a checkpoint too. Also on resuming a
            checkpoint of another regime, or of a run without this callback.

    References:
        Hoffer, Hubara, Soudry 2017, "Train longer, generalize better", sections 4 and 5. Goyal et al. 2017, "Accurate,
        Large Minibatch SGD". Malladi et al. 2022, "On the SDEs and scaling rules for adaptive gradient algorithms".

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
        train_longer: bool | float = True,
        stretch_schedulers: bool | Literal["auto"] = "auto",
        clip_norm: float | None = None,
        clip_updates: int | None = None,
        warmup_updates: int = 0,
        gradient_noise: bool | str = False,
    ) -> None:
        samples = "the samples of one update over all devices"
        self.reference_batch_size = check_count("reference_batch_size", reference_batch_size, what=samples)
        self.batch_size = None if batch_size is None else check_count("batch_size", batch_size, what=samples)
        if not callable(lr_rule) and lr_rule not in LR_RULES:
            lr_factor(lr_rule, 1.0)  # raises, naming the rules there are
        self.lr_rule = lr_rule
        if not 0 <= train_longer <= 1:
            raise ValueError(
                f"train_longer={train_longer} must be True, False, or from 0 (the reference run's epochs) to 1 (its "
                "updates)."
            )
        self.train_longer = float(train_longer)
        if stretch_schedulers not in ("auto", True, False):
            raise ValueError(f'stretch_schedulers={stretch_schedulers!r} must be "auto", True or False.')
        self.stretch_schedulers: bool | str = stretch_schedulers
        if clip_norm is not None and not 0 < clip_norm < math.inf:
            raise ValueError(f"clip_norm={clip_norm} must be positive and finite, or None for no clipping.")
        self.clip_norm = clip_norm
        if clip_updates is not None:
            check_count("clip_updates", clip_updates, what="the first updates that are clipped, or None for all")
            if clip_norm is None:
                raise ValueError(f"clip_updates={clip_updates} needs a clip_norm, for example the paper's 5.0.")
        self.clip_updates = clip_updates
        self.warmup_updates = check_count("warmup_updates", warmup_updates, 0, "the updates of the warm-up")
        if warmup_updates and lr_rule == "none":
            raise ValueError(f'warmup_updates={warmup_updates} has nothing to grow to with lr_rule="none".')
        if gradient_noise and lr_rule != "none":
            raise ValueError(
                f'gradient_noise={gradient_noise!r} takes the place of a larger learning rate: pass lr_rule="none" '
                "with it."
            )
        self.gradient_noise = gradient_noise
        self.plan: RegimePlan | None = None
        self._finder: LearningRateFinder | None = None  # that may have set the learning rate, at the batch that runs
        self._limits: tuple[int | None, int, int] | None = None  # the user's, while ours are in their place
        self._reset()

    def _reset(self) -> None:
        self._fitting = False
        self._pass: Pass | None = None
        self._effective = 0  # what an update sees by the trainer's account
        self._clocks: list[ReferenceClock] = []
        self._plateaus: list[tuple[LRSchedulerConfig, int]] = []  # with the user's frequency
        self._metrics: dict[str, float] = {}  # the latest values that plateaus look at
        self._counters: list[EpochCounter] = []
        self._warmups: list[Warmup] = []
        self._noise: SampleNoise | None = None
        self._groups: list[int] = []  # of each optimizer, how many
        self._restored: dict[str, Any] = {}
        self._resuming = False
        self._early: dict[str, Any] | None = None  # a checkpoint's callbacks, from before there was a plan
        self._ticked: int | None = None  # up to which update the clocks have been read
        self._epoch_start = 0  # updates made before the present epoch
        self._samples = 0
        self._clipped: Tensor | int = 0
        self._clippable = 0

    # ------------------------------------------------------------------ plan

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Plan the regime and set the limits of epochs and updates; before ``configure_optimizers`` reads them."""
        if stage != "fit":
            return
        require_lightning(trainer, type(self).__name__)
        for callback in cast(Any, trainer).callbacks:
            if isinstance(callback, LearningRateFinder) and callback._update_attr and self.lr_rule != "none":
                self._finder = callback
        if _tuning(trainer):
            return
        train_longer = self.train_longer
        if cast(Any, trainer).fast_dev_run:
            rank_zero_warn("fast_dev_run: LargeBatchRegime scales the learning rate and leaves the length as it is.")
            train_longer = 0.0
        check_trainer(trainer, pl_module, train_longer=bool(train_longer), gradient_noise=bool(self.gradient_noise))
        self._reset()
        self._fitting = True
        try:
            self._pass = self._measure(trainer) if train_longer else None
            self.plan = self._plan(trainer, train_longer)
        except DataNotReady:
            if train_longer:
                raise
            self.plan = None  # of a length there is none to plan: on_fit_start is early enough for the learning rate
            return
        if train_longer:
            self._set_limits(trainer, self.plan)

    def _plan_late(self, trainer: Trainer) -> None:
        """Plan once the module's own setup has made its data, and look at a checkpoint that has been read before."""
        try:
            self.plan = self._plan(trainer, 0.0)
        except DataNotReady as error:
            raise error.__cause__ or error from None
        if self._early is not None:
            self._refuse_unscaled(self._early)
            if state := self._early.get(self.state_key):
                self.load_state_dict(state)

    def _measure(self, trainer: Trainer) -> Pass | None:
        try:
            return pass_over_data(trainer)
        except MisconfigurationException:
            unlimited = trainer.fit_loop.max_epochs in (None, -1)
            if self.train_longer == 1 and unlimited and trainer.max_steps != -1:
                return None  # max_steps are updates, whatever an epoch is
            raise

    def _plan(self, trainer: Trainer, train_longer: float) -> RegimePlan:
        batch_size = self.batch_size or effective_batch_size(trainer)
        ratio = batch_size / self.reference_batch_size
        rule, factor = rule_name(self.lr_rule), lr_factor(self.lr_rule, ratio)
        try:
            variance = noise_variance(ratio) if self.gradient_noise else 0.0
            plan = self._planned_length(trainer, train_longer, batch_size, rule, factor)
        except ValueError as error:
            raise MisconfigurationException(f"LargeBatchRegime cannot plan this run: {error}") from error
        return replace(
            plan,
            clip_norm=self.clip_norm,
            clip_updates=self.clip_updates,
            warmup_updates=0 if factor == 1.0 else self.warmup_updates,
            noise_variance=variance,
        )

    def _rate_found(self) -> bool:
        """Whether LearningRateFinder has set the learning rate; it may also have found none."""
        found = None if self._finder is None else self._finder.optimal_lr
        return found is not None and found._optimal_idx is not None

    def _planned_length(
        self, trainer: Trainer, train_longer: float, batch_size: int, rule: str, factor: float
    ) -> RegimePlan:
        max_steps = None if trainer.max_steps == -1 else trainer.max_steps
        plan = RegimePlan(self.reference_batch_size, batch_size, rule, factor)
        if self._pass is None:
            if not train_longer:
                return plan
            return replace(plan, train_longer=train_longer, reference_updates=max_steps, updates=max_steps)
        found = self._effective = effective_batch_size(trainer)
        if batch_size != found:
            rank_zero_warn(
                f"LargeBatchRegime scales for batch_size={batch_size}, as asked; an update of this trainer sees "
                f"{found} samples (loader's batch x accumulation x replicas)."
            )
        epochs = trainer.fit_loop.max_epochs
        return plan_regime(
            reference_batch_size=self.reference_batch_size,
            batch_size=batch_size,
            lr_rule=rule,
            lr_factor=factor,
            reference_updates_per_epoch=updates_in_epoch(
                self._pass.samples, self.reference_batch_size, drop_last=self._pass.drop_last
            ),
            updates_per_epoch=updates_in_epoch(self._pass.batches, trainer.accumulate_grad_batches),
            max_epochs=None if epochs in (None, -1) else epochs,
            max_steps=max_steps,
            min_epochs=trainer.fit_loop.min_epochs or 0,
            train_longer=train_longer,
        )

    def _set_limits(self, trainer: Trainer, plan: RegimePlan) -> None:
        loop = trainer.fit_loop
        self._limits = (loop.max_epochs, loop.min_epochs or 0, loop.epoch_loop.max_steps)
        loop.min_epochs = plan.min_epochs
        if plan.epochs is not None:
            loop.max_epochs = plan.epochs
        loop.epoch_loop.max_steps = plan.max_steps

    def _release(self, trainer: Trainer) -> None:
        """Give everything back that is the user's."""
        self._fitting = False
        if self._limits is not None:
            loop = trainer.fit_loop
            loop.max_epochs, loop.min_epochs, loop.epoch_loop.max_steps = self._limits
            self._limits = None
        for counter in self._counters:
            counter.give_back()
        self._counters = []
        for warmup in self._warmups:
            warmup.remove()
        if self._noise is not None:
            self._noise.remove()

    # ---------------------------------------------------------------- change

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scale the learning rates and take over the schedulers' clocks; before a checkpoint is restored over them."""
        if self.plan is None:
            self._plan_late(trainer)
        plan = _planned(self.plan)
        if plan.lr_rule != _FOUND and not self._restored and self._rate_found():
            rank_zero_warn(
                "LargeBatchRegime: LearningRateFinder found the learning rate of the batch that runs, so it is not "
                "scaled."
            )
            plan = _with_found_rate(plan)
        if self._limits is not None:
            # With max_steps set, Lightning resumes from the end of an epoch by one stray batch of that epoch. So it is
            # set while configure_optimizers may read it, and again once a checkpoint is restored.
            trainer.fit_loop.epoch_loop.max_steps = -1
        if self._resuming:
            self._lift_epochs(trainer)
        configs = trainer.lr_scheduler_configs
        check_optimizers(trainer, plan)
        if plan.lr_factor != 1.0 and any(optimizer in _scaled for optimizer in trainer.optimizers):
            raise MisconfigurationException(
                "LargeBatchRegime: configure_optimizers returned the optimizer of an earlier fit, whose learning rates "
                "are scaled already. Make a new optimizer and new schedulers in configure_optimizers."
            )
        check_schedulers(trainer, pl_module, plan, self.stretch_schedulers)
        if plan.noise_variance:
            self._noise = self._weigh_samples(trainer, pl_module, plan)
        before = _learning_rates(trainer)
        _scale(trainer, plan.lr_factor, plan.moment_ratio)
        self._warmups = [
            Warmup(optimizer, updates=plan.warmup_updates, factor=plan.lr_factor) for optimizer in trainer.optimizers
        ]
        self._groups = [len(optimizer.param_groups) for optimizer in trainer.optimizers]
        fates = [self._take_over(config, plan) for config in configs]
        # Within one update, Lightning steps the schedulers of every update before those of every epoch.
        self._clocks.sort(key=lambda clock: clock.interval == "epoch")
        if plan.reclocked:
            self._counters = list(epoch_counters(trainer))
            warn_of_other_counters(trainer, plan)
        self.plan = replace(
            plan,
            learning_rates=tuple(zip(before, _learning_rates(trainer), strict=True)),
            schedulers=tuple(fates),
            companions=tuple(counter.fate for counter in self._counters),
        )
        self._report(trainer, self.plan)

    def _lift_epochs(self, trainer: Trainer) -> None:
        """Let a checkpoint be restored that has more epochs behind it, of a larger batch, than this run has in all."""
        if self._limits is not None:
            trainer.fit_loop.max_epochs = -1

    def _weigh_samples(self, trainer: Trainer, pl_module: LightningModule, plan: RegimePlan) -> SampleNoise:
        try:
            _, module = output_module(pl_module, self.gradient_noise if isinstance(self.gradient_noise, str) else None)
        except ValueError as error:
            raise MisconfigurationException(f"LargeBatchRegime: {error}") from None
        seed = from_rank_zero(trainer, torch.initial_seed())
        return SampleNoise(module, plan.noise_variance, seed=seed, rank=data_parallel_rank(trainer))

    def _take_over(self, config: LRSchedulerConfig, plan: RegimePlan) -> str:
        """Take a scheduler out of Lightning's hands if it counts epochs, and return its line in the table.

        It stays in Lightning's lists, so it is saved, restored and monitored.
        """
        name, interval, frequency = type(config.scheduler).__name__, config.interval, config.frequency
        if sized_from_trainer(config, plan, self.stretch_schedulers) and plan.reclocked:
            return f"{name}: every {frequency} {interval}(s), has this run's length"
        if not plan.reclocked or (interval == "step" and frequency == 1 and plan.pace == 1):
            return f"{name}: every {frequency} {interval}(s), as it was"
        if config.reduce_on_plateau:
            self._plateaus.append((config, frequency))
            config.interval, config.frequency = "step", NEVER
            return f"{name}: every {frequency} reference epoch(s), at the end of an epoch of this run"
        by_epoch = interval == "epoch"
        clock = ReferenceClock(
            config.scheduler,
            "epoch" if by_epoch else "step",
            frequency,
            cast(int, plan.reference_updates_per_epoch),
            plan.pace,
            plan.reference_updates,
        )
        self._clocks.append(clock)
        # A frequency that no epoch has as many batches as: Lightning itself never steps the scheduler.
        config.interval, config.frequency = "step", NEVER
        every = frequency * (cast(Any, plan.stretched_epoch) if by_epoch else 1 / plan.pace)
        unit = f"{frequency} reference epoch(s)" if by_epoch else f"{frequency} of a reference epoch's"
        return f"{name}: every {float(every):g} updates ({unit})"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the loaded data is what was planned for, and take up what a checkpoint left."""
        plan = _planned(self.plan)
        if self._pass is not None:
            found = (trainer.num_training_batches, effective_batch_size(trainer))
            if found != (self._pass.batches, self._effective):
                raise MisconfigurationException(
                    f"LargeBatchRegime planned for {self._pass.batches} training batches an epoch and "
                    f"{self._effective} samples an update, but there are {found[0]} and {found[1]}. The loader or "
                    "accumulate_grad_batches changed after setup: set both before fit, or pass train_longer=False."
                )
        changed = self._take_up(trainer, plan)
        if self._limits is not None:
            loop = trainer.fit_loop
            loop.epoch_loop.max_steps = plan.max_steps
            if plan.epochs is not None:
                loop.max_epochs = plan.epochs
                epochs = plan.epochs_from(trainer.current_epoch, trainer.global_step)
                if epochs > plan.epochs or changed:
                    # The checkpoint's epochs were not all of this plan's length: its last one cut short and not taken
                    # up again, or all of another batch.
                    loop.max_epochs, loop.epoch_loop.max_steps = epochs, cast(int, plan.updates)
        if self._ticked is None:
            self._ticked = trainer.global_step
        self._tick(trainer.global_step)
        batches = trainer.fit_loop.epoch_loop
        if batches.restarted_on_train_batch_end and batches.batch_progress.is_last_batch and not changed:
            # A checkpoint of an epoch's last batch, from before its validation: Lightning goes on in the next epoch
            # without ending this one, nor starting that one. Plateaus still have this one's end before them.
            self._set_counters(trainer.global_step)
        else:
            self._arm(trainer.global_step if changed else self._epoch_start)

    def _take_up(self, trainer: Trainer, plan: RegimePlan) -> bool:
        """Take up what a checkpoint left; return whether it is of another batch."""
        saved, self._restored = self._restored, {}
        if not saved:
            return False
        for warmup, made in zip(self._warmups, saved["made"], strict=True):
            warmup.made = made
        if self._noise is not None:
            self._noise.seed, self._noise.draws = saved["noise"]
        before = saved["plan"]
        if before["batch_size"] == plan.batch_size:
            return False
        full = before["updates_per_epoch"]
        if full and (trainer.global_step - saved["epoch_start"]) % full:
            raise MisconfigurationException(
                f"The checkpoint was written within an epoch, at the batch {before['batch_size']}. To go on at "
                f"{plan.batch_size}, take one from the end of an epoch."
            )
        for config, fate in zip(trainer.lr_scheduler_configs, plan.schedulers, strict=True):
            if fate.endswith("has this run's length") and config.interval == "epoch":
                raise MisconfigurationException(
                    f"{type(config.scheduler).__name__} has the length of a run at the batch {before['batch_size']}, "
                    "which the checkpoint restores. To go on at another batch, give it the reference run's epochs."
                )
        correction = plan.lr_factor / before["lr_factor"]
        moment_ratio = plan.ratio / before["ratio"] if plan.lr_rule == "adam" else 1.0
        _scale(trainer, correction, moment_ratio)
        rank_zero_info(
            f"LargeBatchRegime goes on at the batch {plan.batch_size} from {before['batch_size']}: learning rates "
            f"times {correction:.4g}."
        )
        return True

    @rank_zero_only
    def _report(self, trainer: Trainer, plan: RegimePlan) -> None:
        say(plan.table())
        log_facts(trainer.loggers, _PREFIX, plan.to_dict())
        log_table(trainer.loggers, f"{_PREFIX}plan", PLAN_COLUMNS, plan.rows())

    # ----------------------------------------------------------------- train

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what happens at the end of this epoch."""
        for config, _ in self._plateaus:
            used, now = self._metrics.get(str(config.monitor)), trainer.callback_metrics.get(str(config.monitor))
            if used is not None and now is not None and used != float(now) and not math.isnan(used):
                rank_zero_warn(
                    f"LargeBatchRegime: {type(config.scheduler).__name__} looks at {config.monitor} before "
                    "LightningModule.on_train_epoch_end logs it, so at the value of an epoch before. Log it in a step."
                )
        self._arm(trainer.global_step)

    def _arm(self, start: int) -> None:
        self._epoch_start = start
        self._set_counters(start)

    def _set_counters(self, start: int) -> None:
        plan = _planned(self.plan)
        if self._counters:
            end = start + cast(int, plan.updates_per_epoch)
            end = end if plan.updates is None else min(end, plan.updates)
            for counter in self._counters:
                counter.set(plan, start, end)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Expect one weighted output."""
        if self._noise is not None:
            self._noise.new_batch()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check that the noise reaches all weights, once, and that samples do not interact."""
        if self._noise is not None:
            try:
                self._noise.check(pl_module, loss)
            except ValueError as error:
                raise MisconfigurationException(f"LargeBatchRegime: {error}") from None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Clip the gradients."""
        plan = _planned(self.plan)
        if plan.clip_norm is None:
            return
        if plan.clip_updates is not None and self._warmup_of(trainer, optimizer).made >= plan.clip_updates:
            return
        norm = clip_gradients(trainer, optimizer, plan.clip_norm)
        # A tensor, so that a GPU does not wait here.
        self._clipped = self._clipped + ((norm > plan.clip_norm) & norm.isfinite()).long()
        self._clippable += 1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what plateaus look at, for a checkpoint that is written now."""
        if self._plateaus and not trainer.sanity_checking:
            self._read_metrics(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step the schedulers that look at a metric, if a reference epoch has ended; before a checkpoint is written.

        Lightning itself would do so after the checkpoint, and not at all in the first epoch of a resumed run.
        """
        if not self._plateaus:
            return
        self._read_metrics(trainer)
        plan = _planned(self.plan)
        start, end = (plan.reference_epochs_in(updates) for updates in (self._epoch_start, trainer.global_step))
        for config, every in self._plateaus:
            if end // every == start // every:
                continue
            metric = self._metrics.get(str(config.monitor))
            if metric is None:
                missing = f"{type(config.scheduler).__name__} looks at {config.monitor}, which nothing has logged yet"
                if config.strict:
                    known = sorted(trainer.callback_metrics)
                    raise MisconfigurationException(f"{missing}. There are {known}: set monitor to one of these.")
                rank_zero_warn(f"{missing}; it is not stepped.")
            else:
                pl_module.lr_scheduler_step(cast(Any, config.scheduler), metric)

    def _read_metrics(self, trainer: Trainer) -> None:
        known = trainer.callback_metrics
        keys = [str(config.monitor) for config, _ in self._plateaus]
        self._metrics.update({key: float(known[key]) for key in keys if key in known})

    def _warmup_of(self, trainer: Trainer, optimizer: Optimizer) -> Warmup:
        return next(w for o, w in zip(trainer.optimizers, self._warmups, strict=True) if o is optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Step the schedulers that the reference run would step after this update, and log where the run is."""
        plan = _planned(self.plan)
        updated = trainer.global_step != self._ticked
        self._tick(trainer.global_step)
        if self._pass is not None:
            self._samples += self._pass.samples_until(batch_idx + 1) - self._pass.samples_until(batch_idx)
        elif updated:
            self._samples += plan.batch_size
        if updated:
            self._log(trainer, pl_module, plan)
            self._watch_groups(trainer, plan)
        if trainer.global_step == trainer.max_steps and plan.ends_with_reference_epoch:
            # max_steps alone would end the run without the validation that ends the reference run's last epoch.
            trainer.should_stop = True

    def _log(self, trainer: Trainer, pl_module: LightningModule, plan: RegimePlan) -> None:
        facts: dict[str, Any] = {"updates": float(trainer.global_step), "samples_seen": float(self._samples)}
        if self._warmups[0].made:
            facts["learning_rate"] = self._warmups[0].rate
            facts["lr_over_batch"] = self._warmups[0].rate / plan.batch_size
        if self._clippable:
            facts["clipped_fraction"] = self._clipped / self._clippable
        define_axes(trainer.loggers, f"{_PREFIX}updates", [_PREFIX + name for name in facts])
        for name, value in facts.items():
            pl_module.log(_PREFIX + name, filled(value, pl_module.device))

    def _watch_groups(self, trainer: Trainer, plan: RegimePlan) -> None:
        sizes = [len(optimizer.param_groups) for optimizer in trainer.optimizers]
        for optimizer, size, before in zip(trainer.optimizers, sizes, self._groups, strict=True):
            if size <= before or plan.lr_factor == 1.0:
                continue
            rate = optimizer.param_groups[-1]["lr"]
            if rate != optimizer.defaults["lr"]:
                rank_zero_warn(
                    f"LargeBatchRegime: a parameter group was added with the learning rate {float(rate):g}, which is "
                    "taken as it is. A group without a rate of its own gets the optimizer's, which is scaled."
                )
        self._groups = sizes

    def _tick(self, update: int) -> None:
        for passed in range(cast(int, self._ticked) + 1, update + 1):
            for clock in self._clocks:
                for _ in range(clock.steps(passed)):
                    clock.scheduler.step()
        self._ticked = update

    # ----------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """Return the plan and where the run is in it, as plain Python."""
        if self.plan is None:
            return {}
        return {
            "plan": self.plan.to_dict(),
            "ticked": self._ticked,
            "epoch_start": self._epoch_start,
            "samples": self._samples,
            "metrics": dict(self._metrics),
            "made": [warmup.made for warmup in self._warmups],
            "clipped": [int(self._clipped), self._clippable],
            "noise": None if self._noise is None else [self._noise.seed, self._noise.draws],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a checkpoint is of this regime and take up its clock.

        Args:
            state_dict: What :meth:`state_dict` returned when the checkpoint was written.
        """
        if not self._fitting or self.plan is None:
            return
        plan, saved = _planned(self.plan), state_dict["plan"]
        if saved["lr_rule"] == _FOUND:
            plan = self.plan = _with_found_rate(plan)
        differences = plan.disagreements(saved)
        if differences:
            raise MisconfigurationException(
                f"The checkpoint is of another regime: {'; '.join(differences)}. Resume with the same LargeBatchRegime "
                "arguments and data, or start a new run from its weights."
            )
        if state_dict["ticked"] is None:
            return  # written before training, by LearningRateFinder
        self._restored = state_dict
        self._ticked, self._epoch_start = state_dict["ticked"], state_dict["epoch_start"]
        self._samples, self._metrics = state_dict["samples"], state_dict["metrics"]
        self._clipped, self._clippable = state_dict["clipped"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume a run that was not of this regime: its learning rates would silently win."""
        if not self._fitting:
            return
        callbacks = checkpoint.get("callbacks", {})
        if self.plan is None:
            self._early = callbacks
        else:
            self._refuse_unscaled(callbacks)
        self._resuming = True
        if self._warmups:  # this strategy restores after on_fit_start
            self._lift_epochs(trainer)

    def _refuse_unscaled(self, callbacks: dict[str, Any]) -> None:
        plan = _planned(self.plan)
        if (plan.lr_factor != 1.0 or plan.reclocked) and self.state_key not in callbacks:
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


def _learning_rates(trainer: Trainer) -> list[float]:
    return [float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups]


def _scale(trainer: Trainer, factor: float, moment_ratio: float) -> None:
    """Multiply every learning rate of a trainer's optimizers and schedulers, and follow with Adam's moments."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    if factor != 1.0:
        _scaled.update(trainer.optimizers)
        for optimizer in trainer.optimizers:
            scale_optimizer(optimizer, factor)
        for scheduler in schedulers:
            scale_scheduler(scheduler, factor)
    if moment_ratio != 1.0:
        for optimizer in trainer.optimizers:
            scale_moments(optimizer, moment_ratio)
        for scheduler in schedulers:
            scale_momentums(scheduler, moment_ratio)


def _with_found_rate(plan: RegimePlan) -> RegimePlan:
    return replace(plan, lr_rule=_FOUND, lr_factor=1.0, warmup_updates=0)


def _planned(plan: RegimePlan | None) -> RegimePlan:
    assert plan is not None, "setup precedes every other hook of fit"
    return plan


def _tuning(trainer: Any) -> bool:
    """Whether a method of ``Tuner`` runs: it ends before training, and the fit that follows plans anew."""
    return any(
        isinstance(callback, (BatchSizeFinder, LearningRateFinder)) and callback._early_exit
        for callback in trainer.callbacks
    )
