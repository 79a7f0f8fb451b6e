"""The callback that turns the regime of a small-batch reference run into the regime of the batch that really runs."""

import math
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer

from lightning_gap.checks import check_count
from lightning_gap.regime.advice import advice
from lightning_gap.regime.answers import ReferenceAnswers, length_holder
from lightning_gap.regime.applied import check_unscaled, clock_of, scale
from lightning_gap.regime.clock import ReferenceClock, RegimeClock
from lightning_gap.regime.counters import (
    NEVER,
    EpochCounter,
    ValidationClock,
    epoch_counters,
    patience,
    validates_within_epochs,
    warn_of_other_counters,
)
from lightning_gap.regime.lengths import curve
from lightning_gap.regime.loader import (
    DataNotReady,
    check_first_batch,
    same_data,
)
from lightning_gap.regime.plan import PLAN_COLUMNS, RegimePlan
from lightning_gap.regime.planning import RunPlanner
from lightning_gap.regime.plateaus import ReferencePlateaus
from lightning_gap.regime.refusals import (
    check_hand_set_rates,
    check_hand_stepped,
    check_optimizers,
    check_schedulers,
    check_trainer,
    keeps_lengths,
    stepper,
)
from lightning_gap.regime.sample_noise import SampleNoise, output_module
from lightning_gap.regime.scaling import EQUAL_SAMPLES, LR_RULES, LRRule, default_train_longer, lr_factor
from lightning_gap.regime.warmup import Warmup
from lightning_gap.trainer.internals.of_lightning import ends_tuning, found_a_rate, sets_the_rate, updates_logs
from lightning_gap.trainer.loggers import log_facts, log_now, log_table
from lightning_gap.trainer.strategy import clip_gradients, data_parallel_rank, from_rank_zero, require_lightning
from lightning_gap.trainer.terminal import say

__all__ = ["LargeBatchRegime"]

_PREFIX = "lightning_gap/regime/"
# The rule of a learning rate that LearningRateFinder has found at the batch that runs.
_FOUND = "found"


class LargeBatchRegime(Callback):
    r"""Train at a large batch by the regime of a small-batch reference run: scale the learning rate, train longer.

    Write the regime of the reference run: its learning rate, its schedulers and ``Trainer(max_epochs=...)``, as for one
    device at the batch ``reference_batch_size`` without accumulation. Whatever ``configure_optimizers`` asks of lengths
    is answered as in the reference run: ``trainer.max_epochs``, ``trainer.estimated_stepping_batches``,
    ``trainer.num_training_batches``, ``len(train_dataloader)``. The callback turns it into the regime of the batch that
    runs, :math:`|B_L|` = loader's batch × accumulation × data-parallel replicas:

    .. math:: \eta_L(t) = f(|B_L| / |B_S|) \; \eta_S(t), \qquad t = 1, \dots, T_L = T_S,

    in updates t: with ``train_longer`` the run makes exactly as many updates as the reference run, and its learning
    rate at every update is the factor times the reference run's at the same update, whatever the scheduler. To that
    end whatever Lightning does every epoch waits until a *reference* epoch of updates is over: schedulers are stepped
    right then; validation, early stopping, ``ReduceLROnPlateau`` and the checkpoints of ``ModelCheckpoint`` at the end
    of this run's epoch in which it falls. A ``val_check_interval`` counts updates of the reference run. Your own code
    reads :attr:`reference_epoch` where it would read ``current_epoch``.

    Every schedule is rolled out before training: one that fails, stops early or has a length of this run, which your
    code computed elsewhere, is refused. What the callback did is printed as a table, with five points of the learning
    rate, and logged as hyperparameters; ``updates``, ``samples_seen``, ``reference_epoch``, ``learning_rate``,
    ``lr_over_batch`` and ``clipped_fraction`` are logged under ``lightning_gap/regime/`` at every update that loggers
    get, one in ``log_every_n_steps``.

    Args:
        reference_batch_size: Samples per update of the reference run, :math:`|B_S|`.
        batch_size: Samples per update of this run over all devices, accumulation included, :math:`|B_L|`. Default:
            :func:`effective_batch_size`. Needed only where the loader does not tell.
        lr_rule: ``"sqrt"`` (Hoffer et al.), ``"linear"`` (Goyal et al.), ``"adam"`` (Malladi et al.: √ratio, and the
            moments' 1 − β and ε with it), ``"none"``, or a callable from the ratio :math:`|B_L| / |B_S|` to the
            factor.
        train_longer: Whether to make as many updates as the reference run, or how far to go from its epochs, 0, to its
            updates, 1; schedules run through in that time. Default: 1, and 0 for ``"linear"`` and ``"adam"``, which are
            derived for equal samples.
        stretch_schedulers: ``"auto"`` takes every scheduler's lengths for the reference run's and refuses those that
            look like this run's; ``True`` takes all for the reference run's; ``False`` takes all for this run's, which
            the trainer then answers in ``configure_optimizers``.
        samples: Samples in one pass over the data on all devices. Needed only where the loader does not tell.
        clip_norm: Clip the L2 norm of each optimizer's gradients to this (5 in the paper). ``None``: do not.
        clip_updates: Clip in this many first updates only. ``None``: in all.
        warmup_updates: In how many updates the learning rate grows from the reference run's to the scaled one,
            linearly, under whatever schedule runs.
        gradient_noise: Instead of a larger learning rate, weight each sample's gradient by
            :math:`z_n \sim N(1, |B_L| / |B_S| - 1)`, which gives the large batch the gradient noise of the small one.
            ``True``, or the name of the last module before the loss. Needs ``lr_rule="none"``.

    Attributes:
        plan: The :class:`RegimePlan` of the latest fit.
        reference_epoch: How many epochs of the reference run are over, a part of one included.

    Raises:
        TypeError: If a batch size or a number of updates is not an int.
        ValueError: If an argument is out of its range, or does not go with another.
        MisconfigurationException: When ``fit`` starts, before anything is changed, if the trainer, the module, its
            optimizer, a scheduler or the loader is one that this regime cannot be right for; so is an optimizer
            that an earlier fit in this process has scaled, on resuming from a checkpoint too. At the first batch, if it
            has other samples than the loader tells of. Also on resuming a checkpoint of another regime, or of a run
            without this callback.

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
        train_longer: bool | float | None = None,
        stretch_schedulers: bool | Literal["auto"] = "auto",
        samples: int | None = None,
        clip_norm: float | None = None,
        clip_updates: int | None = None,
        warmup_updates: int = 0,
        gradient_noise: bool | str = False,
    ) -> None:
        of_update = "the samples of one update over all devices"
        self.reference_batch_size = check_count("reference_batch_size", reference_batch_size, what=of_update)
        self.batch_size = None if batch_size is None else check_count("batch_size", batch_size, what=of_update)
        if not callable(lr_rule) and lr_rule not in LR_RULES:
            lr_factor(lr_rule, 1.0)  # raises, naming the rules there are
        self.lr_rule = lr_rule
        if train_longer is None:
            train_longer = default_train_longer(lr_rule)
        elif not 0 <= train_longer <= 1:
            raise ValueError(
                f"train_longer={train_longer} must be True, False, or from 0 (the reference run's epochs) to 1 (its "
                "updates)."
            )
        elif train_longer and lr_rule in EQUAL_SAMPLES:
            rank_zero_warn(
                f'LargeBatchRegime: lr_rule="{lr_rule}" is derived for the same samples, and train_longer='
                f"{float(train_longer):g} makes more updates than that. Pass train_longer=False, its default."
            )
        self.train_longer = float(train_longer)
        self.samples = None if samples is None else check_count("samples", samples, what="the samples of an epoch")
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
        self._answers: ReferenceAnswers | None = None
        self._reset()

    def _reset(self) -> None:
        self._fitting = False
        self._planner = RunPlanner(self, keeps_lengths=False)
        self._clock: RegimeClock | None = None
        self._validations: ValidationClock | None = None
        self._expected: int | None = None  # samples of the first batch, until it has been looked at
        self._plateaus = ReferencePlateaus()
        self._counters: list[EpochCounter] = []
        self._warmups: list[Warmup] = []
        self._noise: SampleNoise | None = None
        self._groups: list[int] = []  # of each optimizer, how many
        self._restored: dict[str, Any] = {}
        self._resuming = False
        self._early: dict[str, Any] | None = None  # a checkpoint's callbacks, from before there was a plan
        self._ticked: int | None = None  # up to which update the clocks have been read
        self._epoch_start = 0  # updates made before the present epoch
        self._epochs = 0  # of this run
        self._samples = 0
        self._clipped: Tensor | int = 0
        self._clippable = 0

    # ------------------------------------------------------------------ plan

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Plan the regime, and let the trainer answer as in the reference run until its schedulers are made."""
        if stage != "fit":
            return
        require_lightning(trainer, type(self).__name__)
        for callback in cast(Any, trainer).callbacks:
            if isinstance(callback, LearningRateFinder) and sets_the_rate(callback) and self.lr_rule != "none":
                self._finder = callback
        if _tuning(trainer):
            return
        dry = bool(cast(Any, trainer).fast_dev_run)
        if dry:
            rank_zero_warn("fast_dev_run: LargeBatchRegime scales the learning rate and leaves the length as it is.")
        longer = bool(self.train_longer) and not dry
        check_trainer(trainer, pl_module, train_longer=longer, gradient_noise=bool(self.gradient_noise))
        self._reset()
        self._fitting = True
        stay = dry or (not longer and keeps_lengths(trainer, pl_module))
        self._planner, self.plan = RunPlanner(self, keeps_lengths=stay), None
        plan = None
        try:
            plan = self._make_plan(trainer)
        except DataNotReady:
            if self.stretch_schedulers is False and longer:
                raise  # the limits are to be this run's before configure_optimizers asks for them
        if stay:
            return
        if self.stretch_schedulers is False:
            if plan is not None:
                self._set_limits(trainer, plan)
            return
        self._answers = ReferenceAnswers(
            trainer,
            lambda: self._planner.reference_lengths(trainer, self._make_plan(trainer), self._limits),
            lambda loader: same_data(loader, self._planner.loader),
        )
        self._answers.begin(
            pl_module,
            length_holder(self._planner.loader),
            before=lambda: self._plan_late(trainer),
            after=lambda: self._set_limits(trainer, _planned(self.plan)),
        )

    def _make_plan(self, trainer: Trainer) -> RegimePlan:
        if self.plan is None:
            self.plan = self._planner.plan(trainer)
            self._expected = self._planner.expected
        return self.plan

    def _plan_late(self, trainer: Trainer) -> None:
        """Plan once the module's own setup has made its data, and look at a checkpoint that has been read before."""
        if self.plan is not None:
            return
        try:
            self._make_plan(trainer)
        except DataNotReady as error:
            raise error.__cause__ or error from None
        if self._early is not None:
            self._refuse_unscaled(self._early)
            if state := self._early.get(self.state_key):
                self.load_state_dict(state)

    def _rate_found(self) -> bool:
        """Whether LearningRateFinder has set the learning rate; it may also have found none."""
        return self._finder is not None and found_a_rate(self._finder)

    def _set_limits(self, trainer: Trainer, plan: RegimePlan) -> None:
        loop = trainer.fit_loop
        if self._limits is not None or (plan.updates_per_epoch is None and not self.train_longer):
            return
        self._limits = (loop.max_epochs, loop.min_epochs or 0, loop.epoch_loop.max_steps)
        loop.min_epochs = plan.min_epochs
        if plan.epochs is not None:
            loop.max_epochs = plan.epochs
        loop.epoch_loop.max_steps = plan.max_steps

    def _release(self, trainer: Trainer) -> None:
        """Give everything back that is the user's."""
        self._fitting = False
        if self._answers is not None:
            self._answers.end()
            self._answers = None
        if self._limits is not None:
            loop = trainer.fit_loop
            loop.max_epochs, loop.min_epochs, loop.epoch_loop.max_steps = self._limits
            self._limits = None
        for counter in self._counters:
            counter.give_back()
        self._counters = []
        if self._validations is not None:
            self._validations.give_back()
            self._validations = None
        for warmup in self._warmups:
            warmup.remove()
        if self._noise is not None:
            self._noise.remove()

    # ---------------------------------------------------------------- change

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scale the learning rates and take over the schedulers' clocks; before a checkpoint is restored over them."""
        self._plan_late(trainer)
        plan = _planned(self.plan)
        reference = None
        if self._answers is not None:
            self._answers.end()
            reference = self._answers.at
        if plan.lr_rule != _FOUND and not self._restored and self._rate_found():
            rank_zero_warn(
                "LargeBatchRegime: LearningRateFinder found the learning rate of the batch that runs, so it is not "
                "scaled."
            )
            plan = _with_found_rate(plan)
        step = stepper(pl_module)
        check_optimizers(trainer, plan)
        if plan.lr_factor != 1.0:
            check_hand_set_rates(trainer, pl_module)
            try:
                check_unscaled(trainer.optimizers)
            except ValueError as error:
                raise MisconfigurationException(f"LargeBatchRegime: {error}") from None
        data = self._planner.data
        batches = () if data is None else data.numbers_of_batches(trainer.accumulate_grad_batches)
        if reference is not None:
            self._planner.reference_lengths(trainer, plan, self._limits)
        rollouts = check_schedulers(
            trainer,
            plan,
            self.stretch_schedulers,
            step=step,
            reference=reference,
            batches=batches,
            otherwise=self._planner.otherwise(self._answers, pl_module),
        )
        if plan.reclocked and validates_within_epochs(trainer):
            try:
                self._validations = ValidationClock(trainer, plan)
            except ValueError as error:
                raise MisconfigurationException(f"LargeBatchRegime: {error}") from None
        if plan.reclocked and self.stretch_schedulers:
            check_hand_stepped(trainer, pl_module)
        self._warn_of_kept_optimizers(trainer, pl_module, plan)
        if not self._planner.keeps_lengths:
            self._set_limits(trainer, plan)
        if self._limits is not None:
            # With max_steps set, Lightning resumes from the end of an epoch by one stray batch. So it is set again once
            # a checkpoint is restored.
            trainer.fit_loop.epoch_loop.max_steps = -1
        if self._resuming:
            self._lift_epochs(trainer)
        if plan.noise_variance:
            self._noise = self._weigh_samples(trainer, pl_module, plan)
        before = _learning_rates(trainer)
        configs = trainer.lr_scheduler_configs
        scale(trainer.optimizers, [config.scheduler for config in configs], plan.lr_factor, plan.moment_ratio)
        self._warmups = [
            Warmup(optimizer, updates=plan.warmup_updates, factor=plan.lr_factor) for optimizer in trainer.optimizers
        ]
        self._groups = [len(optimizer.param_groups) for optimizer in trainer.optimizers]
        taken = [self._take_over(config, plan) for config in configs]
        clocks = [clock for _, clock in taken if clock is not None]
        self._clock = RegimeClock(plan, clocks, self._warmups, step, reference)
        if plan.reclocked:
            if plan.stretch != 1:
                self._counters = list(epoch_counters(trainer))
                warn_of_other_counters(trainer, plan)
            if self._validations is not None:
                self._validations.lift()
        companions = [counter.fate(plan) for counter in self._counters]
        if self._validations is not None:
            companions.append(self._validations.fate)
        companions += patience(trainer, plan, self._validations)
        self.plan = replace(
            plan,
            learning_rates=tuple(zip(before, _learning_rates(trainer), strict=True)),
            schedulers=tuple(fate for fate, _ in taken),
            companions=tuple(companions),
            curve=curve(plan, before[0], rollouts) if before else (),
        )
        self._report(trainer, pl_module, self.plan)

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

    def _warn_of_kept_optimizers(self, trainer: Trainer, pl_module: LightningModule, plan: RegimePlan) -> None:
        for name, value in vars(pl_module).items():
            if plan.lr_factor != 1.0 and any(value is optimizer for optimizer in trainer.optimizers):
                rank_zero_warn(
                    f"LargeBatchRegime: the module keeps its optimizer as {name}, whose learning rates stay scaled "
                    "after fit, for a fit without the callback too. Make a new one in configure_optimizers."
                )

    def _take_over(self, config: LRSchedulerConfig, plan: RegimePlan) -> tuple[str, ReferenceClock | None]:
        """Take a scheduler out of Lightning's hands if its lengths are the reference run's.

        It stays in Lightning's lists, so it is saved, restored and monitored.

        Returns:
            Its line in the table, and its clock.
        """
        name, interval, frequency = type(config.scheduler).__name__, config.interval, config.frequency
        by_epoch = interval == "epoch"
        if not plan.reclocked:
            return f"{name}: every {frequency} {interval}(s), as it was", None
        if not self.stretch_schedulers:
            return f"{name}: every {frequency} {interval}(s), has this run's length", None
        if config.reduce_on_plateau:
            if not by_epoch or plan.stretch == 1:
                return f"{name}: every {frequency} {interval}(s), as it was", None
            self._plateaus.take(config)
            return f"{name}: every {frequency} reference epoch(s), at the end of an epoch of this run", None
        clock = clock_of(plan, config.scheduler, "epoch" if by_epoch else "step", frequency)
        # A frequency that no epoch has as many batches as: Lightning itself never steps the scheduler.
        config.interval, config.frequency = "step", NEVER
        if by_epoch:
            every = float(frequency * cast(Any, plan.stretched_epoch))
            return f"{name}: every {frequency} reference epoch(s), {every:g} updates", clock
        if plan.pace == 1:
            return f"{name}: every {frequency} update(s), as in the reference run", clock
        return f"{name}: {float(plan.pace / frequency):.4g} times an update, through the reference run's length", clock

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the loaded data is what was planned for, and take up what a checkpoint left."""
        plan = _planned(self.plan)
        self._planner.check(trainer)
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
        clock = self._running()
        clock.updates = trainer.global_step if self._ticked is None else self._ticked
        self._tick(trainer.global_step)
        if self._validations is not None:
            self._validations.begin(trainer.global_step)
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
        if self._running().clocks and plan.pace != 1 and any(c.interval == "step" for c in self._running().clocks):
            raise MisconfigurationException(
                "A scheduler of updates, at train_longer=False, cannot go on at another batch: its updates behind it "
                "were of other lengths. Go on at the batch of the checkpoint, or step it by epochs."
            )
        correction = plan.lr_factor / before["lr_factor"]
        moment_ratio = plan.ratio / before["ratio"] if plan.lr_rule == "adam" else 1.0
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        scale(trainer.optimizers, schedulers, correction, moment_ratio)
        rank_zero_info(
            f"LargeBatchRegime goes on at the batch {plan.batch_size} from {before['batch_size']}: learning rates "
            f"times {correction:.4g}."
        )
        return True

    @rank_zero_only
    def _report(self, trainer: Trainer, pl_module: LightningModule, plan: RegimePlan) -> None:
        layers = {kind.__name__ for layer in pl_module.modules() for kind in type(layer).__mro__}
        beside = {type(callback).__name__ for callback in cast(Any, trainer).callbacks}
        ghosts = "GhostNorm" in layers or "GhostBatchNorm" in beside
        say(plan.table(), *advice(plan, batchnorm="_BatchNorm" in layers, ghosts=ghosts))
        log_facts(trainer.loggers, _PREFIX, plan.to_dict())
        log_table(trainer.loggers, f"{_PREFIX}plan", PLAN_COLUMNS, plan.rows())

    # ----------------------------------------------------------------- train

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what happens at the end of this epoch."""
        self._plateaus.warn_of_late_metrics(trainer)
        self._epochs = trainer.current_epoch
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
        """Look at the first batch, and expect one weighted output."""
        if self._expected is not None:
            last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
            if not last or trainer.num_training_batches == 1:
                check_first_batch(batch, self._expected)
                self._expected = None
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
        self._clipped = self._clipped + ((norm > plan.clip_norm) & (norm < math.inf))
        self._clippable += 1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what plateaus look at, for a checkpoint that is written now."""
        if not trainer.sanity_checking:
            self._plateaus.read(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step the schedulers that look at a metric, if a reference epoch has ended; before a checkpoint is written.

        Lightning itself would do so after the checkpoint, and not at all in the first epoch of a resumed run.
        """
        plan = _planned(self.plan)
        before, now = (plan.reference_epochs_in(updates) for updates in (self._epoch_start, trainer.global_step))
        self._plateaus.step(trainer, pl_module, before, now)

    def _warmup_of(self, trainer: Trainer, optimizer: Optimizer) -> Warmup:
        return next(w for o, w in zip(trainer.optimizers, self._warmups, strict=True) if o is optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Step the schedulers that the reference run would step after this update, and log where the run is."""
        plan, update = _planned(self.plan), trainer.global_step
        updated = update != self._ticked
        if updated:
            self._tick(update)
        if (data := self._planner.data) is not None:
            self._samples += data.samples_until(batch_idx + 1) - data.samples_until(batch_idx)
        elif updated:
            self._samples += plan.batch_size
        if self._validations is not None:
            self._validations.after(update if updated else None)
        if not updated:
            return
        if updates_logs(trainer):
            self._log(trainer, pl_module, plan)
        if plan.lr_factor != 1.0:
            self._watch_groups(trainer)
        if update == trainer.max_steps and plan.ends_with_reference_epoch and self._validations is None:
            # max_steps alone would end the run without the validation that ends the reference run's last epoch.
            trainer.should_stop = True

    def _log(self, trainer: Trainer, pl_module: LightningModule, plan: RegimePlan) -> None:
        facts: dict[str, Any] = {
            "updates": float(trainer.global_step),
            "samples_seen": float(self._samples),
            "reference_epoch": self.reference_epoch,
        }
        if self._warmups[0].made and self._warmups[0].known:
            facts["learning_rate"] = self._warmups[0].rate
            facts["lr_over_batch"] = self._warmups[0].rate / plan.batch_size
        if self._clippable:
            facts["clipped_fraction"] = self._clipped / self._clippable
        log_now(trainer, pl_module.device, _PREFIX, facts)

    @property
    def reference_epoch(self) -> float:
        """How many epochs of the reference run are over, a part of one included; before ``fit``, 0."""
        epoch = None if self.plan is None else self.plan.stretched_epoch
        return float(self._epochs) if epoch is None else float((self._ticked or 0) / epoch)

    def _watch_groups(self, trainer: Trainer) -> None:
        sizes = [len(optimizer.param_groups) for optimizer in trainer.optimizers]
        if sizes == self._groups:
            return
        for optimizer, size, before in zip(trainer.optimizers, sizes, self._groups, strict=True):
            if size <= before:
                continue
            rate = optimizer.param_groups[-1]["lr"]
            if rate != optimizer.defaults["lr"]:
                rank_zero_warn(
                    f"LargeBatchRegime: a parameter group was added with the learning rate {float(rate):g}, which is "
                    "taken as it is. A group without a rate of its own gets the optimizer's, which is scaled."
                )
        self._groups = sizes

    def _tick(self, update: int) -> None:
        self._running().advance(update)
        self._ticked = update

    def _running(self) -> RegimeClock:
        assert self._clock is not None, "on_fit_start precedes training"
        return self._clock

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
            "metrics": dict(self._plateaus.metrics),
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
        self._samples, self._plateaus.metrics = state_dict["samples"], state_dict["metrics"]
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
    rates = [group.get("lr") for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return [float(rate) for rate in rates if rate is not None]  # some optimizers find their own


def _with_found_rate(plan: RegimePlan) -> RegimePlan:
    return replace(plan, lr_rule=_FOUND, lr_factor=1.0, warmup_updates=0)


def _planned(plan: RegimePlan | None) -> RegimePlan:
    assert plan is not None, "setup precedes every other hook of fit"
    return plan


def _tuning(trainer: Any) -> bool:
    """Whether a method of ``Tuner`` runs: it ends before training, and the fit that follows plans anew."""
    return any(
        isinstance(callback, (BatchSizeFinder, LearningRateFinder)) and ends_tuning(callback)
        for callback in trainer.callbacks
    )
