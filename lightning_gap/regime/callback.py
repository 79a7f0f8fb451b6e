"""The callback that turns the regime of a small-batch reference run into the regime of the batch that really runs."""

import math
from typing import Any, Literal, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_gap.checks import check_integer
from lightning_gap.regime.loader import check_first_batch
from lightning_gap.regime.plan import RegimePlan
from lightning_gap.regime.refusals import refused_as
from lightning_gap.regime.report import PREFIX, log_update, report
from lightning_gap.regime.resume import state_of
from lightning_gap.regime.rules.auto import AUTO, rules_for
from lightning_gap.regime.rules.hyperparameters import BetasRule, MomentumRule, WeightDecayRule
from lightning_gap.regime.run import Phase, RegimeRun
from lightning_gap.regime.scaling import EQUAL_SAMPLES, LR_RULES, LRRule, default_train_longer, lr_factor
from lightning_gap.regime.trainer_refusals import check_regime_trainer, is_tuning, keeps_lengths
from lightning_gap.regime.weight_averages import EMARule, check_ema_rule
from lightning_gap.trainer.internals.of_lightning import found_a_rate, sets_the_rate, updates_logs
from lightning_gap.trainer.strategy import clip_gradients, require_lightning

__all__ = ["PREFIX", "LargeBatchRegime"]


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
            factor. ``"auto"`` chooses between ``"sqrt"`` with a warm-up and ``"none"``, and says why.
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
        weight_decay_rule: ``"timescale"``, ``"none"``, or a function of the ratio, see
            :class:`~lightning_gap.regime.OptimizerRules`. Default: ``"none"``; ``"timescale"`` under ``"auto"``.
        betas_rule: ``"half_life"``, ``"sde"``, ``"none"``, or a function. Default: ``"none"``; ``"sde"`` under
            ``"adam"``, ``"half_life"`` under ``"auto"``.
        ema_rule: ``"half_life"`` lets the decay of ``EMAWeightAveraging`` remember as many samples, ρ^κ at equal
            samples; ``"none"``; or a function of decay and ratio. Default: ``"none"``; ``"half_life"`` under
            ``"auto"``.
        momentum_rule: ``"half_life"`` lets momentum remember as many samples, μ^κ at equal samples, and multiplies the
            rate of SGD by (1 − μ^κ) / (1 − μ) beside its rule. Default: ``"none"``.
        noise_scale: For ``"auto"``, the ``estimate.critical_batch_size`` of a :class:`GradientNoiseScale` of an earlier
            run, in samples, where it is known. What one beside this callback measures is for the next run, and it says
            what that would come to.

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
        weight_decay_rule: WeightDecayRule | None = None,
        betas_rule: BetasRule | None = None,
        ema_rule: EMARule | None = None,
        momentum_rule: MomentumRule = "none",
        noise_scale: float | None = None,
    ) -> None:
        of_update = "the samples of one update over all devices"
        self.reference_batch_size = check_integer("reference_batch_size", reference_batch_size, what=of_update)
        self.batch_size = None if batch_size is None else check_integer("batch_size", batch_size, what=of_update)
        if not callable(lr_rule) and lr_rule not in (*LR_RULES, AUTO):
            lr_factor(lr_rule, 1.0)  # raises, naming the rules there are
        self.lr_rule, self.rules = lr_rule, rules_for(lr_rule, weight_decay_rule, betas_rule, momentum_rule)
        self.ema_rule, self.noise_scale = check_ema_rule(ema_rule, auto=lr_rule == AUTO), noise_scale
        if noise_scale is not None and (lr_rule != AUTO or not 0 < noise_scale < math.inf):
            unknown = " NaN is a noise scale that was not averaged out: measure longer, or leave it out."
            raise ValueError(
                f'noise_scale={noise_scale} must be positive samples, and is for lr_rule="auto" alone.'
                f"{unknown if math.isnan(noise_scale) else ''}"
            )
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
        self.samples = None if samples is None else check_integer("samples", samples, what="the samples of an epoch")
        if stretch_schedulers not in ("auto", True, False):
            raise ValueError(f'stretch_schedulers={stretch_schedulers!r} must be "auto", True or False.')
        self.stretch_schedulers: bool | str = stretch_schedulers
        if clip_norm is not None and not 0 < clip_norm < math.inf:
            raise ValueError(f"clip_norm={clip_norm} must be positive and finite, or None for no clipping.")
        self.clip_norm = clip_norm
        if clip_updates is not None:
            check_integer("clip_updates", clip_updates, what="the first updates that are clipped, or None for all")
            if clip_norm is None:
                raise ValueError(f"clip_updates={clip_updates} needs a clip_norm, for example the paper's 5.0.")
        self.clip_updates = clip_updates
        self.warmup_updates = check_integer("warmup_updates", warmup_updates, 0, "the updates of the warm-up")
        if warmup_updates and lr_rule == "none":
            raise ValueError(f'warmup_updates={warmup_updates} has nothing to grow to with lr_rule="none".')
        if gradient_noise and lr_rule != "none":
            raise ValueError(
                f'gradient_noise={gradient_noise!r} takes the place of a larger learning rate: pass lr_rule="none" '
                "with it."
            )
        self.gradient_noise = gradient_noise
        self._finder: LearningRateFinder | None = None  # that may have set the learning rate, at the batch that runs
        self._run: RegimeRun | None = None  # the present fit, or the latest

    @property
    def plan(self) -> RegimePlan | None:
        """The plan of the latest fit."""
        return None if self._run is None else self._run.plan

    @property
    def reference_epoch(self) -> float:
        """How many epochs of the reference run are over, a part of one included; before ``fit``, 0."""
        if self._run is None:
            return 0.0
        epoch = None if self._run.plan is None else self._run.plan.stretched_epoch
        progress = self._run.progress
        return float(progress.epochs) if epoch is None else float((progress.ticked or 0) / epoch)

    @property
    def _now(self) -> RegimeRun:
        if self._run is None:
            raise AttributeError("setup precedes every other hook of fit")
        return self._run

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Plan the regime, and let the trainer answer as in the reference run until its schedulers are made."""
        if stage != "fit":
            return
        require_lightning(trainer, type(self).__name__)
        for callback in cast(Any, trainer).callbacks:
            if isinstance(callback, LearningRateFinder) and sets_the_rate(callback) and self.lr_rule != "none":
                self._finder = callback
        if is_tuning(trainer):
            return
        dry = bool(cast(Any, trainer).fast_dev_run)
        if dry:
            rank_zero_warn("fast_dev_run: LargeBatchRegime scales the learning rate and leaves the length as it is.")
        longer = bool(self.train_longer) and not dry
        check_regime_trainer(trainer, pl_module, train_longer=longer, gradient_noise=bool(self.gradient_noise))
        stay = dry or (not longer and keeps_lengths(trainer, pl_module))
        self._run = RegimeRun(self, keeps_lengths=stay)
        self._run.set_up(trainer, pl_module, longer=longer)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scale the learning rates and take over the schedulers' clocks; before a checkpoint is restored over them."""
        found = self._finder is not None and found_a_rate(self._finder)
        self._now.take_over(trainer, pl_module, rate_found=found)
        report(trainer, pl_module, self._now.planned, self.noise_scale)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the loaded data is what was planned for, and take up what a checkpoint left."""
        self._now.start(trainer)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what happens at the end of this epoch."""
        run = self._now
        run.plateaus.warn_of_late_metrics(trainer)
        run.progress.epochs = trainer.current_epoch
        run.start_epoch(trainer.global_step)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look at the first batch, and expect one weighted output."""
        run = self._now
        if run.planner.expected is not None:
            last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
            if not last or trainer.num_training_batches == 1:
                check_first_batch(batch, run.planner.expected)
                run.planner.expected = None
        if run.running.noise is not None:
            run.running.noise.new_batch()

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check that the noise reaches all weights, once, and that samples do not interact."""
        noise = self._now.running.noise
        if noise is not None:
            refused_as(noise.check, pl_module, loss)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Clip the gradients."""
        run, plan = self._now, self._now.planned
        if plan.clip_norm is None:
            return
        if plan.clip_updates is not None and run.running.warmup_of(optimizer).made >= plan.clip_updates:
            return
        norm = clip_gradients(trainer, optimizer, plan.clip_norm)
        # A tensor, so that a GPU does not wait here.
        run.progress.clipped = run.progress.clipped + ((norm > plan.clip_norm) & (norm < math.inf))
        run.progress.clippable += 1

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Step the schedulers that the reference run would step after this update, and log where the run is."""
        run, update = self._now, trainer.global_step
        plan, taken, progress = run.planned, run.running, run.progress
        updated = update != progress.ticked
        if updated:
            run.tick(update)
        if (data := run.planner.data) is not None:
            progress.samples += data.samples_until(batch_idx + 1) - data.samples_until(batch_idx)
        elif updated:
            progress.samples += plan.batch_size
        if taken.validations is not None:
            taken.validations.after(update if updated else None)
        if not updated:
            return
        if updates_logs(trainer):
            log_update(trainer, pl_module, run, self.reference_epoch)
        if plan.scales_rates:
            taken.watch_groups()
        if update == trainer.max_steps and plan.ends_with_reference_epoch and taken.validations is None:
            # max_steps alone would end the run without the validation that ends the reference run's last epoch.
            trainer.should_stop = True

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what plateaus look at, for a checkpoint that is written now."""
        if not trainer.sanity_checking and self._run is not None:
            self._run.plateaus.read(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step the schedulers that look at a metric, if a reference epoch has ended; before a checkpoint is written.

        Lightning itself would do so after the checkpoint, and not at all in the first epoch of a resumed run.
        """
        run = self._now
        made = run.progress.epoch_start, trainer.global_step
        before, now = (run.planned.reference_epochs_in(updates) for updates in made)
        run.plateaus.step(trainer, pl_module, before, now)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the plan and where the run is in it, as plain Python."""
        return {} if self._run is None or self._run.plan is None else state_of(self._run)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a checkpoint is of this regime and take up its clock.

        Args:
            state_dict: What :meth:`state_dict` returned when the checkpoint was written.
        """
        if self._run is not None and self._run.phase is not Phase.OVER:
            self._run.load(state_dict)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume a run that was not of this regime: its learning rates would silently win."""
        if self._run is not None and self._run.phase is not Phase.OVER:
            self._run.read(trainer, checkpoint.get("callbacks", {}))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the trainer the user's limits back."""
        if self._run is not None:
            self._run.release(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the trainer the user's limits back after an exception, for there is no teardown then."""
        self.teardown(trainer, pl_module, "fit")
