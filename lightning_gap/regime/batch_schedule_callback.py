"""The callback that trains at a batch which changes with the samples seen."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_gap.checks import check_choice, check_integer
from lightning_gap.regime.batch_schedule_run import ScheduledRun
from lightning_gap.regime.batch_schedule_table import report
from lightning_gap.regime.batches import batch_schedule
from lightning_gap.regime.batches.base import BatchSchedule
from lightning_gap.regime.batches.noise import NoiseBatches
from lightning_gap.regime.callback import PREFIX, LargeBatchRegime
from lightning_gap.regime.noise_scale_callback import FIRST_VERDICT, GradientNoiseScale
from lightning_gap.regime.rules.auto import AUTO
from lightning_gap.regime.rules.factor import LRRule, rule_name
from lightning_gap.regime.rules.hyperparameters import (
    BetasRule,
    MomentumRule,
    OptimizerRules,
    Rescaling,
    WeightDecayRule,
)
from lightning_gap.regime.rules.optimizers import kind_of
from lightning_gap.regime.scaling import check_rule
from lightning_gap.regime.trainer_refusals import check_schedule_trainer, is_tuning
from lightning_gap.regime.weight_averages import EMARule, check_ema_rule
from lightning_gap.trainer.internals.of_lightning import updates_logs
from lightning_gap.trainer.loggers import log_now
from lightning_gap.trainer.strategy import require_lightning

__all__ = ["BatchSizeSchedule"]


class BatchSizeSchedule(Callback):
    r"""Train at a batch that changes with the samples seen, at the learning rate that belongs to each batch.

    What small batches are good for is the first phase of the high learning rate; after it a run may take larger ones at
    no loss, in fewer updates, at the same samples. Write the reference run as for the batch :math:`B_0` on one device:
    learning rate, any torch scheduler, ``max_epochs`` or ``max_steps``. With :math:`\kappa(s) = B(s) / B_0` after s
    samples the update is made at

    .. math:: \eta'(s) = f(\kappa(s)) \, \eta(s),

    where :math:`\eta(s)` is the reference run's rate after as many samples: schedulers are stepped when the reference
    run has stepped them. Epochs have the same samples and stay what they are.

    The batch is drawn by a batch sampler of its own from the loader's data, workers, collation and sampler, in the
    loader's order (of its sampler, at a seed of this run), split over devices and, beyond ``max_device_batch_size``,
    into accumulated parts. Gradients are means over samples, also where parts are not of one size, so that one, two or
    four devices make the same updates. Loaders that cannot be drawn from (iterable data, own batch samplers) are
    accumulated, in multiples of their batch.

    Logged under ``lightning_gap/regime/``: ``batch_size``, ``samples_seen``, ``updates``, ``learning_rate``.

    Args:
        schedule: Pairs ``(samples, batch)``: from so many samples on, this batch over all devices; a function of the
            samples seen; ``"seesaw"``, :class:`SeesawBatches`: as the scheduler lowers the rate; ``"plateau"``,
            :class:`PlateauBatches`: as ``val_loss`` stays; ``"noise"``, :class:`NoiseBatches`: as the gradient noise
            scale grows, which a :class:`GradientNoiseScale` beside it measures; or a :class:`BatchSchedule` of these
            or your own.
        reference_batch_size: :math:`B_0`. Default: the first batch of pairs, else what an update of the trainer sees.
        max_batch_size: The largest batch over all devices. Needed where the batch follows what training measures.
            Default: the samples of an epoch, and 32 times :math:`B_0` for ``"seesaw"``.
        max_device_batch_size: The samples that a device can hold in one pass; more are accumulated. Default: any, and
            the loader's batch where the trainer accumulates.
        lr_rule: How the learning rate follows the batch, as in :class:`LargeBatchRegime`: ``"sqrt"``, ``"linear"``,
            ``"none"``, or a callable from the ratio to the factor. ``"auto"``: what is derived for equal samples,
            ``"linear"`` for SGD and LARS, ``"sqrt"`` for Adam, LAMB and their kin.
        weight_decay_rule: How weight decay follows it, as in :class:`OptimizerRules`: ``"none"``, ``"timescale"``, or
            a callable.
        betas_rule: How betas follow it: ``"none"``, ``"half_life"``, or a callable.
        momentum_rule: How momentum follows it: ``"none"``, or ``"half_life"``: μ^κ, and the rate of SGD with it.
        ema_rule: How the decay ρ of ``EMAWeightAveraging`` follows it: ``"half_life"`` remembers as many samples
            throughout, ρ^κ (Busbridge et al. 2023), ``"none"``, or a callable from decay and ratio to the decay. None:
            ``"half_life"`` where there is an average. Given back after ``fit``.
        multiple_of: Batches that are real numbers are rounded to multiples of this. Default: an eighth of :math:`B_0`.
        by: ``"loader"``, ``"accumulation"``, or ``"auto"``: the loader where it can be.

    Raises:
        TypeError: If a batch is not an int.
        ValueError: If an argument is out of its range, or a maximum is missing.
        MisconfigurationException: When ``fit`` starts, before anything is changed, if trainer, loader, optimizer or
            scheduler are ones that this cannot be right for. On resuming a checkpoint of another schedule, or of a run
            without this callback.

    References:
        Smith, Kindermans, Ying, Le 2018, "Don't decay the learning rate, increase the batch size". Merrill et al. 2025,
        "Critical batch size revisited" (batch warm-up). Meterez et al. 2025, "Seesaw". Hoffer et al. 2017, section 6.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> growing = BatchSizeSchedule([(0, 4), (32, 16)])
        >>> trainer = Trainer(
        ...     max_epochs=2, accelerator="cpu", callbacks=[growing], logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> data = torch.utils.data.DataLoader(torch.randn(64, 32), batch_size=4)
        >>> trainer.fit(BoringModel(), data)  # doctest: +ELLIPSIS
        Batch-size schedule...
        >>> trainer.global_step  # 8 updates of 4 samples, 6 of 16
        14
    """

    def __init__(
        self,
        schedule: str | Sequence[tuple[int, int]] | Callable[[int], float] | BatchSchedule,
        *,
        reference_batch_size: int | None = None,
        max_batch_size: int | None = None,
        max_device_batch_size: int | None = None,
        lr_rule: LRRule = AUTO,
        weight_decay_rule: WeightDecayRule = "none",
        betas_rule: BetasRule = "none",
        momentum_rule: MomentumRule = "none",
        ema_rule: EMARule | None = None,
        multiple_of: int | None = None,
        by: Literal["auto", "loader", "accumulation"] = "auto",
    ) -> None:
        self.schedule = batch_schedule(schedule)
        for name, value in (
            ("reference_batch_size", reference_batch_size),
            ("max_batch_size", max_batch_size),
            ("max_device_batch_size", max_device_batch_size),
            ("multiple_of", multiple_of),
        ):
            if value is not None:
                check_integer(name, value, what="samples")
        if self.schedule.adaptive and max_batch_size is None:
            raise ValueError(
                f"schedule={self.schedule.name!r} follows what training measures and needs a max_batch_size, the "
                "largest batch over all devices that it may grow to."
            )
        if lr_rule == "adam" or betas_rule == "sde":
            raise ValueError(
                'lr_rule="adam" and betas_rule="sde" end at a ratio of a few: pass lr_rule="sqrt" with '
                'betas_rule="half_life", which are for any.'
            )
        # Raises, naming the rules there are.
        self._rules = OptimizerRules(
            "none" if lr_rule == AUTO else lr_rule, weight_decay_rule, betas_rule, momentum_rule
        )
        if ema_rule is not None:
            check_ema_rule(ema_rule, auto=True)
        check_choice("by", by, ("auto", "loader", "accumulation"))
        self.reference_batch_size, self.max_batch_size = reference_batch_size, max_batch_size
        self.max_device_batch_size, self.lr_rule = max_device_batch_size, lr_rule
        self.weight_decay_rule, self.betas_rule, self.momentum_rule = weight_decay_rule, betas_rule, momentum_rule
        self.ema_rule = ema_rule
        self.multiple_of, self.by = multiple_of, by
        self._run: ScheduledRun | None = None
        self._noise: GradientNoiseScale | None = None
        self._measured = 0  # noise scales that have been taken in

    @property
    def batch_size(self) -> int:
        """The batch of the present update, over all devices; 0 before a fit."""
        run = self._run
        return 0 if run is None or run.part is None else run.part.batch_size

    @property
    def samples_seen(self) -> int:
        """Samples up to the latest update, passes that are over counted whole."""
        return 0 if self._run is None else self._run.seen

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the trainer, and let it answer as in the reference run until its schedulers are made."""
        if stage != "fit":
            return
        require_lightning(trainer, type(self).__name__)
        self._run = None
        if is_tuning(trainer):
            return
        callbacks = cast(Any, trainer).callbacks
        check_schedule_trainer(
            trainer,
            pl_module,
            self.max_device_batch_size,
            adaptive=self.schedule.adaptive,
            beside_regime=any(isinstance(each, LargeBatchRegime) for each in callbacks),
        )
        self._noise = next((each for each in callbacks if isinstance(each, GradientNoiseScale)), None)
        if isinstance(self.schedule, NoiseBatches) and self._noise is None:
            raise MisconfigurationException(
                "BatchSizeSchedule: the schedule follows the gradient noise scale, and nothing measures it. Add "
                "GradientNoiseScale() to the trainer's callbacks."
            )
        if isinstance(self.schedule, NoiseBatches) and self._noise is not None and self._noise.norm != "euclidean":
            raise MisconfigurationException(
                f"BatchSizeSchedule: the schedule follows the noise scale, and that of norm={self._noise.norm!r} "
                'is another number. Pass norm="euclidean" to GradientNoiseScale.'
            )
        if self._noise is not None and callbacks.index(self._noise) < callbacks.index(self):
            raise MisconfigurationException(
                "BatchSizeSchedule: GradientNoiseScale measures the batch that this callback makes. Put it after "
                "BatchSizeSchedule."
            )
        self._measured = 0
        self._run = ScheduledRun(self, trainer, pl_module)
        self._run.set_up()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check optimizer and schedulers, then take over their clocks."""
        run = self._run
        if run is None:
            return
        rules = self._rules_of(trainer.optimizers)
        for optimizer in trainer.optimizers:
            try:
                check_rule(optimizer, rule_name(rules.lr), 2.0, 0.0)
            except ValueError as error:
                raise MisconfigurationException(str(error)) from None

        @lru_cache(maxsize=1)  # a ratio stays for many updates
        def at_ratio(ratio: float) -> Rescaling:
            return rules.rescaling(ratio, ratio)  # as many reference updates pass in one: equal samples

        def scaled_at(optimizer: Optimizer, group: Mapping[str, Any], ratio: float) -> dict[str, Any]:
            return at_ratio(ratio).at(type(optimizer), group)

        report(run, run.take_over(scaled_at), rules)

    def _rules_of(self, optimizers: Sequence[Optimizer]) -> OptimizerRules:
        """Return the rules of a run, the learning rate's chosen by its optimizer where it is to be."""
        if self.lr_rule != AUTO:
            return self._rules
        kinds = [kind for kind in map(kind_of, optimizers) if kind is not None]
        rules = {"linear" if "linear" in kind.lr_rules else "sqrt" for kind in kinds}
        if len(rules) != 1 or len(kinds) < len(optimizers):
            names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
            raise MisconfigurationException(
                f'BatchSizeSchedule: lr_rule="auto" knows no rule for {names or "no optimizer"}. Pass lr_rule="sqrt", '
                '"linear", "none" or a callable, or add a line to lightning_gap.regime.OPTIMIZERS.'
            )
        return replace(self._rules, lr=rules.pop())

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up what a checkpoint left."""
        if self._run is not None:
            self._run.start()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Make the optimizer that of this update."""
        if self._run is not None:
            self._run.start_batch()

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Weight the gradient of a part that is larger or smaller than the others."""
        part = None if self._run is None else self._run.part
        if part is not None and part.weight != 1.0 and loss.requires_grad:
            weight = part.weight
            loss.register_hook(lambda gradient: gradient * weight)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Step the schedulers, and log where the run is."""
        run = self._run
        if run is None:
            return
        rate = run.rate  # by which the update was made: schedulers are stepped now
        if not run.end_batch():
            return
        noise = self._noise
        if noise is not None and noise.estimate.measurements not in (self._measured, *range(FIRST_VERDICT)):
            self._measured = noise.estimate.measurements
            run.observe_noise(noise.estimate.noise_scale)
        if updates_logs(trainer):
            facts: dict[str, Any] = {
                "updates": float(trainer.global_step),
                "samples_seen": float(run.seen),
                "batch_size": float(self.batch_size),
            }
            if rate is not None:
                facts["learning_rate"] = rate
            log_now(trainer, pl_module.device, PREFIX, facts)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let an adaptive schedule look at what was measured."""
        if self._run is not None and self.schedule.adaptive and not trainer.sanity_checking:
            self._run.observe(dict(trainer.callback_metrics))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a pass; let an adaptive schedule look at what was measured, where nothing is validated."""
        if self._run is None:
            return
        self._run.end_epoch()
        if self.schedule.adaptive and not trainer.enable_validation:
            self._run.observe(dict(trainer.callback_metrics))

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return where the run is, as plain Python."""
        return {} if self._run is None else {**self._run.state_dict(), "measured": self._measured}

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the reference run's hyperparameters: a run without this callback goes on as that one."""
        if self._run is not None and self._run.held is not None and not self._run.over:
            saved = iter(self._run.held.state_dict())
            for state in checkpoint.get("optimizer_states", []):
                for group in state.get("param_groups", []):
                    group.update({key: _like(group[key], value) for key, value in next(saved).items() if key in group})

    def __getstate__(self) -> dict[str, Any]:
        kept = {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")}
        return {**kept, "_run": None, "_noise": None}  # of a trainer, which does not travel

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a checkpoint is of this schedule, and go on where it was written.

        Args:
            state_dict: What :meth:`state_dict` returned when the checkpoint was written.
        """
        if self._run is not None and not self._run.over:
            self._run.load(state_dict)
            self._measured = state_dict["measured"]

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume a run that was not of this schedule: nothing tells how many samples it has seen."""
        if self._run is not None and not self._run.over and self.state_key not in checkpoint.get("callbacks", {}):
            raise MisconfigurationException(
                "The checkpoint was written without BatchSizeSchedule, so it does not tell where its run was. Resume "
                "without the callback, or start a new run from its weights."
            )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give everything back."""
        if self._run is not None:
            self._run.release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give everything back after an exception, for there is no teardown then."""
        self.teardown(trainer, pl_module, "fit")


def _like(value: Any, new: Any) -> Any:
    """Return a saved hyperparameter as what it was: a tensor, a tuple of tensors, or a number."""
    if isinstance(value, Tensor):
        return torch.full_like(value, float(new))
    if isinstance(value, (tuple, list)):
        return type(value)(map(_like, value, new))
    return new
