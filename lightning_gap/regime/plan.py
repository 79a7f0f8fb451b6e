"""The plan of a large-batch regime: what the reference run does, and what this run has to do to match it."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from lightning_gap.regime.clock import SchedulerFate, reference_updates, share_of
from lightning_gap.regime.rules.auto import AUTO
from lightning_gap.regime.rules.factor import RULES
from lightning_gap.regime.rules.hyperparameters import OptimizerRules, Rescaling
from lightning_gap.regime.scaling import Rate

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lightning_gap.regime.clock import RegimeClock

__all__ = ["PLAN_COLUMNS", "RegimePlan"]

# The headings of a plan's table.
PLAN_COLUMNS = ("", "reference", "now")

# In the place of the rule, where the learning rate was found.
_FOUND = "found"


@dataclass(frozen=True)
class RegimePlan:
    r"""A reference run's regime and the regime that matches it at another batch size.

    Attributes:
        reference_batch_size: Samples per update of the reference run, :math:`|B_S|`.
        batch_size: Samples per update of this run, :math:`|B_L|`.
        lr_rule: The name of the learning-rate rule.
        lr_factor: What every learning rate is multiplied by.
        train_longer: How far this run goes from its own number of updates, 0, to the reference run's, 1.
        reference_updates_per_epoch: Updates in one epoch of the reference run; ``None`` where the loader has no length.
        updates_per_epoch: Updates in one epoch of this run; ``None`` in the same case.
        samples: Samples in one pass over the data; ``None`` in the same case.
        drop_last: Whether an incomplete last batch is dropped.
        reference_epochs: The reference run's limit of epochs; ``None`` where it has none.
        epochs: This run's limit of epochs; ``None`` where it has none.
        min_epochs: This run's least number of epochs.
        reference_updates: Updates of the reference run; ``None`` where nothing limits them.
        updates: Updates of this run, the reference run's own if ``train_longer`` is 1; ``None`` where nothing limits
            them.
        clip_norm: The gradient norm that is not exceeded; ``None`` for no clipping.
        clip_updates: Up to which update gradients are clipped; ``None`` for all.
        warmup_updates: After how many updates the learning rate has its full factor.
        noise_variance: The variance of the samples' weights in the gradient, 0 without noise.
        learning_rates: The first learning rate of every group, of the reference run and of this run.
        schedulers: Of each scheduler, its class and what becomes of it.
        companions: One line for all else that counts epochs: what it is and what becomes of it.
        curve: Five points of the first group's learning rate from the first update to the last: an update of the
            reference run and its rate, the update of this run and its rate.
        rate: Whether the learning rate comes from the rule, or has been found at the batch that runs.
        weight_decay_rule: The name of the rule of weight decay.
        betas_rule: The name of the rule of the betas.
        ema_rule: The name of the rule of the weights' average.
        momentum_rule: The rule of momentum.
        rules: The rules themselves; where there are none, those of ``lr_rule``.
        why: What ``lr_rule="auto"`` has chosen, and why.
        hyperparameters: Of all else that changes, what it is, in the reference run and in this run.
    """

    reference_batch_size: int
    batch_size: int
    lr_rule: str
    lr_factor: float
    train_longer: float = 0.0
    reference_updates_per_epoch: int | None = None
    updates_per_epoch: int | None = None
    samples: int | None = None
    drop_last: bool = False
    reference_epochs: int | None = None
    epochs: int | None = None
    min_epochs: int = 0
    reference_updates: int | None = None
    updates: int | None = None
    clip_norm: float | None = None
    clip_updates: int | None = None
    warmup_updates: int = 0
    noise_variance: float = 0.0
    learning_rates: tuple[tuple[float, float], ...] = ()
    schedulers: tuple[SchedulerFate, ...] = ()
    companions: tuple[str, ...] = ()
    curve: tuple[tuple[int, float, int, float], ...] = ()
    rate: Rate = Rate.RULED
    weight_decay_rule: str = "none"
    betas_rule: str = "none"
    ema_rule: str = "none"
    momentum_rule: str = "none"
    rules: OptimizerRules | None = field(default=None, compare=False, repr=False)
    why: str = ""
    hyperparameters: tuple[tuple[str, str, str], ...] = ()

    @property
    def ratio(self) -> float:
        """This run's batch over the reference batch."""
        return self.batch_size / self.reference_batch_size

    @property
    def rescaling(self) -> Rescaling:
        """What changes the hyperparameters of the reference run's optimizers into this run's."""
        if self.rate is Rate.FOUND:
            return Rescaling()
        return self._rules.rescaling(self.ratio, self.passed, factor=self.lr_factor)

    @property
    def _rules(self) -> OptimizerRules:
        return self.rules or OptimizerRules(self.lr_rule if self.lr_rule in RULES else "none")

    def rescaling_after(self, saved: dict[str, Any]) -> Rescaling:
        """Return what changes the hyperparameters of a saved plan's run, at another batch, into this run's.

        Args:
            saved: What :meth:`to_dict` returned when the checkpoint was written.
        """
        if self.rate is Rate.FOUND:
            return Rescaling()
        there = saved["ratio"] if self.train_longer == 0 else 1.0
        return self.rescaling.after(self._rules.rescaling(saved["ratio"], there, factor=saved["lr_factor"]))

    @property
    def changes(self) -> bool:
        """Whether a checkpoint of the reference run is none of this run."""
        return self.rescaling.changes or not self.decided or self.reclocked

    @property
    def scales_rates(self) -> bool:
        """Whether learning rates change: by their rule, or so that momentum may."""
        return self.lr_factor != 1.0 or (self.momentum_rule != "none" and self.passed != 1)

    @property
    def decided(self) -> bool:
        """Whether the factor is known: ``lr_rule="auto"`` waits for the optimizers."""
        return self.lr_rule != AUTO or bool(self.why)

    @property
    def passed(self) -> float:
        """How many updates of the reference run pass in one of this run: the ratio itself at equal samples."""
        if self.train_longer in (0.0, 1.0):
            return self.ratio if self.train_longer == 0 else 1.0
        if self.stretched_epoch is None or self.reference_updates_per_epoch is None:  # of a run that updates limit
            return self.ratio / (1 + self.train_longer * (self.ratio - 1))
        return float(self.pace)

    @property
    def moment_ratio(self) -> float:
        """What Adam's rule multiplies 1 − β by; 1 under other rules."""
        return self.ratio if self.rescaling.betas == "sde" else 1.0

    @property
    def rule_told(self) -> str:
        """The rule's name, or that the rate was found."""
        return _FOUND if self.rate is Rate.FOUND else self.lr_rule

    def with_found_rate(self) -> "RegimePlan":
        """Return the plan of a run whose learning rate has been found at the batch that runs."""
        return replace(self, rate=Rate.FOUND, lr_factor=1.0, warmup_updates=0, momentum_rule="none")

    def with_rate_of(self, saved: dict[str, Any]) -> "RegimePlan":
        """Return the plan of a run that goes on with the learning rate of a saved plan.

        Args:
            saved: What :meth:`to_dict` returned when the checkpoint was written.
        """
        return self.with_found_rate() if saved["lr_rule"] == _FOUND else self

    @property
    def stretched_epoch(self) -> Fraction | None:
        """In how many updates of this run a reference epoch passes; ``None`` where epochs have no known length."""
        if self.updates_per_epoch is None or self.reference_updates_per_epoch is None:
            return None
        here = self.updates_per_epoch
        return here + share_of(self.train_longer) * (self.reference_updates_per_epoch - here)

    @property
    def pace(self) -> Fraction:
        """How many updates of the reference run pass in one of this run; 1 if ``train_longer`` is 1."""
        epoch, there = self.stretched_epoch, self.reference_updates_per_epoch
        return Fraction(1) if epoch is None or there is None else there / epoch

    @property
    def reclocked(self) -> bool:
        """Whether epochs of this run and of the reference run hold different numbers of updates."""
        return self.reference_updates_per_epoch != self.updates_per_epoch

    @property
    def stretch(self) -> Fraction:
        """How many epochs of this run a reference epoch takes; 1 if ``train_longer`` is 0."""
        epoch = self.stretched_epoch
        return Fraction(1) if epoch is None or self.updates_per_epoch is None else epoch / self.updates_per_epoch

    @property
    def max_steps(self) -> int:
        """This run's limit of updates as Lightning has it: -1 where the limit of epochs says the same."""
        return self.updates if self.updates is not None and self.stops_within_epoch else -1

    @property
    def ends_with_reference_epoch(self) -> bool:
        """Whether the last update is the last of a reference epoch."""
        epoch = self.reference_updates_per_epoch
        return epoch is not None and self.reference_updates is not None and self.reference_updates % epoch == 0

    @property
    def stops_within_epoch(self) -> bool:
        """Whether the last update falls before the end of this run's last epoch."""
        if self.updates is None:
            return False
        return self.epochs is None or self.updates < self.epochs * (self.updates_per_epoch or 0)

    def reference_update(self, update: int) -> int:
        """Return how many updates the reference run has made after some of this run's.

        Args:
            update: Updates behind it.
        """
        return reference_updates(self.pace, update, self.reference_updates)

    def reference_epochs_in(self, updates: int) -> int:
        """Return how many epochs of the reference run are over after some updates of this run.

        Args:
            updates: Updates behind it.
        """
        return math.floor(updates / (self.stretched_epoch or math.inf))

    @property
    def reference_samples_seen(self) -> int | None:
        """Samples that the reference run sees; ``None`` where nothing tells."""
        return self._samples_seen(self.reference_updates, self.reference_updates_per_epoch, self.reference_batch_size)

    @property
    def samples_seen(self) -> int | None:
        """Samples that this run sees; ``None`` where nothing tells."""
        return self._samples_seen(self.updates, self.updates_per_epoch, self.batch_size)

    def _samples_seen(self, updates: int | None, per_epoch: int | None, batch: int) -> int | None:
        if updates is None or per_epoch is None or self.samples is None:
            return None if updates is None else updates * batch
        epochs, within = divmod(updates, per_epoch)
        whole = per_epoch * batch if self.drop_last else self.samples
        return epochs * whole + min(within * batch, whole)

    def small_last_batch(self, batch: int) -> int:
        """Return the samples of an epoch's last update where they are fewer than a batch, else 0.

        Args:
            batch: Samples of the other updates.
        """
        return 0 if self.samples is None or self.drop_last else self.samples % batch

    def epochs_from(self, epoch: int, update: int) -> int:
        """Return how many epochs this run needs in all if, after some, it has made some of its updates.

        Args:
            epoch: Epochs behind it, one cut short counted whole.
            update: Updates behind it.
        """
        return epoch + math.ceil(((self.updates or 0) - update) / (self.updates_per_epoch or 1))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain Python, for a checkpoint or ``logger.log_hyperparams``."""
        facts = asdict(self) | {"lr_rule": self.rule_told}
        del facts["rate"], facts["rules"]
        for name in ("learning_rates", "curve", "hyperparameters"):
            facts[name] = [list(values) for values in facts[name]]
        for name in ("schedulers", "companions"):
            facts[name] = list(map(str, getattr(self, name)))
        return {**facts, "ratio": self.ratio}

    def rows(self) -> list[tuple[str, str, str]]:
        """Return the plan line by line: what, in the reference run, in this run."""
        from lightning_gap.regime.words import table_rows

        return table_rows(self)

    def apply(
        self,
        optimizers: "Optimizer | Iterable[Optimizer]",
        schedulers: Any = (),
        *,
        interval: Literal["epoch", "step"] = "epoch",
        stretch_schedulers: Literal["auto", True] = "auto",
    ) -> "RegimeClock":
        """Turn the reference run's optimizers and schedulers into this run's, and return the clock that steps them.

        For loops without a ``Trainer``: make the optimizer and its schedulers as for the reference run, with its
        ``reference_updates`` and ``reference_epochs``; call the clock's ``step`` once after every update of the
        optimizer, and the schedulers' never; stop when it is ``over``. Checkpoints need the clock's state beside those
        of the optimizers and schedulers, which are to be loaded after this call.

        Args:
            optimizers: An optimizer of the reference run, or several that are stepped together.
            schedulers: A scheduler, or several. ``ReduceLROnPlateau`` is scaled, and stepped by you.
            interval: Whether the reference run steps its schedulers after every epoch or after every update.
            stretch_schedulers: ``"auto"`` refuses lengths that look like this run's own; ``True`` takes all for the
                reference run's.

        Returns:
            The clock.

        Raises:
            ValueError: If the rule is not for an optimizer, if an optimizer or scheduler is scaled already, if a
                scheduler's length or learning rates cannot be the reference run's, or if the plan has no lengths that
                a scheduler of epochs needs. Nothing has been changed then.

        Example:
            >>> import torch
            >>> from lightning_gap.regime import plan_regime
            >>> plan = plan_regime(reference_batch_size=8, batch_size=32, samples=64, max_epochs=2)
            >>> sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
            >>> cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=plan.reference_epochs)
            >>> clock = plan.apply(sgd, cosine)
            >>> while not clock.over:
            ...     sgd.step()
            ...     clock.step()
            >>> clock.updates, clock.reference_epoch, round(cosine.get_last_lr()[0], 6)
            (16, 2.0, 0.0)
        """
        from lightning_gap.regime.applied import apply_plan

        return apply_plan(self, optimizers, schedulers, interval=interval, stretch_schedulers=stretch_schedulers)

    def table(self) -> Table:
        """Return the plan as a table, the reference run beside this run."""
        table = Table(*PLAN_COLUMNS, title="Large-batch regime", title_justify="left")
        for row in self.rows():
            table.add_row(*row)
        return table
