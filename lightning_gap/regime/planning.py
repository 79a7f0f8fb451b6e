"""What a trainer is about to run, measured, and the plan that makes a regime of it."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_gap.regime.answers import ReferenceAnswers, length_holder
from lightning_gap.regime.clock import updates_in_epoch
from lightning_gap.regime.limits import Limits
from lightning_gap.regime.loader import (
    DataNotReady,
    Pass,
    batch_of_update,
    loader_batch_size,
    pass_over_data,
    samples_in_batch,
    training_loader,
)
from lightning_gap.regime.plan import RegimePlan
from lightning_gap.regime.planned import plan_regime
from lightning_gap.regime.rules.auto import AUTO
from lightning_gap.regime.rules.factor import lr_factor, rule_name
from lightning_gap.regime.sample_noise import noise_variance

if TYPE_CHECKING:
    from lightning_gap.regime.callback import LargeBatchRegime

__all__ = ["RunPlanner"]


class RunPlanner:
    """Measures the run that a trainer is about to make, and plans its regime; or keeps the trainer's own lengths."""

    def __init__(self, regime: "LargeBatchRegime", *, keeps_lengths: bool) -> None:
        self._regime, self.keeps_lengths = regime, keeps_lengths
        self.loader: Any = None
        self.data: Pass | None = None  # where it has a known length, and lengths are not kept
        self.expected: int | None = None  # samples of a batch by the loader's account, until they are compared
        self.batches: tuple[int, ...] = ()  # numbers that a user may take for those of this run
        self.lengths: dict[str, Any] = {}  # what the trainer answers as in the reference run, where epochs are known
        self._effective = 0  # what an update sees by the trainer's account

    def plan(self, trainer: Trainer) -> RegimePlan:
        """Return the plan of the run; :class:`DataNotReady` if the module's data are not there yet."""
        regime = self._regime
        self.loader = None
        try:
            self.loader = training_loader(trainer)
        except DataNotReady:
            if not (regime.batch_size and (Limits.of(trainer).only_updates or self.keeps_lengths)):
                raise
        except MisconfigurationException:
            if not regime.batch_size:
                raise
        self.data = None if self.keeps_lengths or self.loader is None else self._measure(trainer)
        batch_size = regime.batch_size or batch_of_update(trainer, self.loader)
        ratio = batch_size / regime.reference_batch_size
        auto = regime.lr_rule == AUTO  # decided once the optimizers are there
        rule, factor = rule_name(regime.lr_rule), 1.0 if auto else lr_factor(regime.lr_rule, ratio)
        try:
            variance = noise_variance(ratio) if regime.gradient_noise else 0.0
            plan = self._planned_length(trainer, batch_size, rule, factor)
        except ValueError as error:
            raise MisconfigurationException(f"LargeBatchRegime cannot plan this run: {error}") from error
        if plan.reference_updates_per_epoch is not None:
            limits = Limits.of(trainer)
            self.lengths = {
                "max_epochs": limits.max_epochs,
                "max_steps": limits.max_steps,
                "num_training_batches": plan.reference_updates_per_epoch,
                "accumulate_grad_batches": 1,
                "estimated_stepping_batches": math.inf if plan.reference_updates is None else plan.reference_updates,
            }
        return replace(
            plan,
            clip_norm=regime.clip_norm,
            clip_updates=regime.clip_updates,
            warmup_updates=0 if factor == 1.0 and not auto else regime.warmup_updates,
            noise_variance=variance,
            rules=regime.rules,
            weight_decay_rule=rule_name(regime.rules.weight_decay),
            betas_rule=rule_name(regime.rules.betas_rule),
            ema_rule=rule_name(regime.ema_rule),
            momentum_rule=regime.rules.momentum,
        )

    def _measure(self, trainer: Trainer) -> Pass | None:
        longer = self._regime.train_longer
        try:
            return pass_over_data(trainer, self.loader, self._regime.samples)
        except MisconfigurationException:
            if not longer or (longer == 1 and Limits.of(trainer).only_updates):
                return None  # max_steps are updates, whatever an epoch is
            raise

    def _planned_length(self, trainer: Trainer, batch_size: int, rule: str, factor: float) -> RegimePlan:
        regime, data = self._regime, self.data
        limits = Limits.of(trainer)
        if self.loader is not None and regime.batch_size is None:
            # Who makes whole batches knows what is in them.
            own = samples_in_batch(self.loader) is not None
            self.expected = None if own else loader_batch_size(self.loader)
        if data is None:
            plan = RegimePlan(regime.reference_batch_size, batch_size, rule, factor)
            if self.keeps_lengths or not regime.train_longer:
                return plan
            return replace(
                plan, train_longer=regime.train_longer, reference_updates=limits.updates, updates=limits.updates
            )
        found = self._effective = self._batch_of_update(trainer)
        self.batches = data.numbers_of_batches(trainer.accumulate_grad_batches)
        if regime.samples is None and batch_size != found:
            rank_zero_warn(
                f"LargeBatchRegime scales for batch_size={batch_size}, as asked; an update of this trainer sees "
                f"{found} samples (loader's batch x accumulation x replicas)."
            )
        plan = plan_regime(
            reference_batch_size=regime.reference_batch_size,
            batch_size=batch_size,
            lr_rule=regime.lr_rule,
            lr_factor=factor,
            updates_per_epoch=updates_in_epoch(data.batches, trainer.accumulate_grad_batches),
            samples=data.samples,
            drop_last=data.drop_last,
            max_epochs=limits.epochs,
            max_steps=limits.updates,
            min_epochs=limits.min_epochs,
            train_longer=regime.train_longer,
        )
        self._check_size(data.samples, found)
        return plan

    def _check_size(self, samples: int, batch: int) -> None:
        reference = self._regime.reference_batch_size
        name = "loader's batch x accumulate_grad_batches x replicas"
        for size, what, remedy in (
            (batch, name, "Lower the loader's batch_size or the others."),
            (reference, "reference_batch_size", f"Pass reference_batch_size={samples}."),
        ):
            if size > samples and self._regime.samples is None:
                raise ValueError(
                    f"{what}={size} is more than the {samples} samples of an epoch, so no update sees as many. "
                    f"{remedy} If the items of the data set are whole batches, pass batch_size= and samples=."
                )

    def _batch_of_update(self, trainer: Trainer) -> int:
        """Return what an update sees by the trainer's account, or as it is given where the loader does not tell."""
        loaded = trainer.train_dataloader
        try:
            return batch_of_update(trainer, self.loader if loaded is None else loaded)
        except MisconfigurationException:
            if self._regime.batch_size is None:
                raise
            return self._regime.batch_size

    def check(self, trainer: Trainer) -> None:
        """Refuse data that are not what was planned for."""
        if self.data is None:
            return
        found = (trainer.num_training_batches, self._batch_of_update(trainer))
        if found not in ((self.data.batches, self._effective), (math.inf, self._effective)):
            raise MisconfigurationException(
                f"LargeBatchRegime planned for {self.data.batches} training batches an epoch and "
                f"{self._effective} samples an update, but there are {found[0]} and {found[1]}. The loader or "
                "accumulate_grad_batches changed after setup: set both before fit, or pass train_longer=False."
            )

    def otherwise(self, answers: ReferenceAnswers | None, pl_module: LightningModule) -> Callable[[], Any] | None:
        """Return what asks ``configure_optimizers`` again, as in a reference run of other lengths.

        It has as many epochs: so a number of this run's batches times the epochs does not change.
        """
        if answers is None or not self.lengths:
            return None
        per_epoch, steps = self.lengths["num_training_batches"] + 7, self.lengths["max_steps"]
        steps = steps if steps == -1 else steps + 11
        others = {
            "max_steps": steps,
            "num_training_batches": per_epoch,
            "estimated_stepping_batches": per_epoch * (self.lengths["max_epochs"] or 0) if steps == -1 else steps,
        }
        return lambda: answers.configured_otherwise(pl_module, length_holder(self.loader), self.lengths | others)
