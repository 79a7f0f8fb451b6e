"""The plan of a large-batch regime: what the reference run does, and what this run has to do to match it."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from lightning_gap.regime.clock import SchedulerFate, share_of, updates_in_epoch
from lightning_gap.regime.rules import RULES
from lightning_gap.regime.scaling import LRRule, Rate, default_train_longer, rule_name
from lightning_gap.regime.scaling import lr_factor as factor_of

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lightning_gap.regime.clock import RegimeClock

__all__ = ["PLAN_COLUMNS", "RegimePlan", "plan_regime"]

# The headings of a plan's table.
PLAN_COLUMNS = ("", "reference", "now")

# In the place of the rule, where the learning rate was found.
_FOUND = "found"
# What must agree between a checkpoint's plan and the plan of the run that resumes from it.
_IDENTITY = ("reference_batch_size", "lr_rule", "train_longer", "reference_updates_per_epoch", "noise_variance")


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

    @property
    def ratio(self) -> float:
        """This run's batch over the reference batch."""
        return self.batch_size / self.reference_batch_size

    @property
    def moment_ratio(self) -> float:
        """What Adam's rule multiplies 1 − β by; 1 under other rules."""
        return self.ratio if self.scales_moments else 1.0

    @property
    def scales_moments(self) -> bool:
        """Whether Adam's moments follow the batch too."""
        return self.rate is Rate.RULED and self.lr_rule in RULES and RULES[self.lr_rule].moments

    @property
    def rule_told(self) -> str:
        """The rule's name, or that the rate was found."""
        return _FOUND if self.rate is Rate.FOUND else self.lr_rule

    def with_found_rate(self) -> "RegimePlan":
        """Return the plan of a run whose learning rate has been found at the batch that runs."""
        return replace(self, rate=Rate.FOUND, lr_factor=1.0, warmup_updates=0)

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
        passed = math.floor(self.pace * update)
        return passed if self.reference_updates is None else min(passed, self.reference_updates)

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
        del facts["rate"]
        for name in ("learning_rates", "curve"):
            facts[name] = [list(values) for values in facts[name]]
        for name in ("schedulers", "companions"):
            facts[name] = list(map(str, getattr(self, name)))
        return {**facts, "ratio": self.ratio}

    def disagreements(self, saved: dict[str, Any]) -> list[str]:
        """Return how a saved plan differs from this one in what a resumed run cannot change.

        The batch may change where the updates do not depend on it; at one batch the factor stays.

        Args:
            saved: What :meth:`to_dict` returned when the checkpoint was written.
        """
        names = [*_IDENTITY, "batch_size"] if self.train_longer not in (0, 1) or self.noise_variance else [*_IDENTITY]
        if saved.get("batch_size") == self.batch_size:
            names.append("lr_factor")  # two functions may have one name
        now = self.to_dict()
        return [
            f"{name} was {saved.get(name)!r} and is {now[name]!r}" for name in names if saved.get(name) != now[name]
        ]

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


def plan_regime(
    *,
    reference_batch_size: int,
    batch_size: int,
    lr_rule: LRRule = "sqrt",
    lr_factor: float | None = None,
    reference_updates_per_epoch: int | None = None,
    updates_per_epoch: int | None = None,
    samples: int | None = None,
    drop_last: bool = False,
    max_epochs: int | None = None,
    max_steps: int | None = None,
    min_epochs: int = 0,
    train_longer: float | None = None,
) -> RegimePlan:
    r"""Plan a run at one batch size that makes as many updates as the reference run at another, or a part of them.

    With :math:`U_S = \lceil N/|B_S| \rceil` updates in a reference epoch and :math:`U_L` in one of this run, a
    reference epoch takes :math:`U = U_L + \lambda (U_S - U_L)` updates, where :math:`\lambda` is ``train_longer``. The
    reference run's E epochs are :math:`\lceil E U \rceil` updates, in :math:`\lceil E U / U_L \rceil` epochs of this
    run; the last one may be cut short. So :math:`\lambda = 1` makes exactly the reference run's updates, and
    :math:`\lambda = 0` its epochs. Multiplying the epochs by the ratio of the batches, as the paper writes it, is not
    exact.

    Args:
        reference_batch_size: Samples per update of the reference run, :math:`|B_S|`.
        batch_size: Samples per update of this run, :math:`|B_L|`; it may be the smaller one too.
        lr_rule: The learning-rate rule, see :func:`lr_factor`.
        lr_factor: What every learning rate is multiplied by. Default: what the rule says.
        reference_updates_per_epoch: Updates in one epoch of the reference run, :math:`U_S`. Default: from ``samples``.
        updates_per_epoch: Updates in one epoch of this run, :math:`U_L`. Default: from ``samples``.
        samples: Samples in one pass over the data, N.
        drop_last: Whether an incomplete last batch is dropped.
        max_epochs: The reference run's epochs, E; ``None`` for no limit.
        max_steps: The reference run's limit of updates; ``None`` for no limit.
        min_epochs: The reference run's least number of epochs.
        train_longer: How far to go from the reference run's epochs to its updates, :math:`\lambda` in [0, 1].
            Default: 1, and 0 for the rules that are derived for equal samples, ``"linear"`` and ``"adam"``.

    Returns:
        The plan.

    Raises:
        ValueError: If an epoch of either run has no update, or its length is not given, or a batch is more than the
            samples that tell it.

    References:
        Hoffer, Hubara, Soudry 2017, "Train longer, generalize better", section 5 (regime adaptation).

    Example:
        >>> plan = plan_regime(reference_batch_size=128, batch_size=4096, samples=50_000, max_epochs=50)
        >>> plan.updates, plan.epochs, plan.stops_within_epoch, round(plan.lr_factor, 4)
        (19550, 1504, True, 5.6569)
    """
    told = updates_per_epoch is None
    sizes = (reference_batch_size, batch_size)
    if samples is not None:
        there, here = (updates_in_epoch(samples, size, drop_last=drop_last) for size in sizes)
        reference_updates_per_epoch = there if reference_updates_per_epoch is None else reference_updates_per_epoch
        updates_per_epoch = here if updates_per_epoch is None else updates_per_epoch
    if reference_updates_per_epoch is None or updates_per_epoch is None:
        raise ValueError("the length of an epoch is unknown: pass samples=, or both runs' updates per epoch.")
    if reference_updates_per_epoch < 1 or updates_per_epoch < 1:
        raise ValueError(
            f"an epoch has {reference_updates_per_epoch} updates at reference_batch_size={reference_batch_size} and "
            f"{updates_per_epoch} at the batch size {batch_size}: both must be at least 1. Use a smaller batch, or "
            "drop_last=False in the DataLoader."
        )
    if told and samples is not None and max(sizes) > samples:
        name = "reference_batch_size" if reference_batch_size > samples else "batch_size"
        raise ValueError(
            f"{name}={max(sizes)} is more than the {samples} samples of an epoch, so no update sees as many. Use "
            f"{samples} or less."
        )
    limits = [] if max_epochs is None else [max_epochs * reference_updates_per_epoch]
    limits += [] if max_steps is None else [max_steps]
    reference_updates = min(limits, default=None)
    rule = rule_name(lr_rule)
    train_longer = default_train_longer(lr_rule) if train_longer is None else float(train_longer)
    epoch = updates_per_epoch + share_of(train_longer) * (reference_updates_per_epoch - updates_per_epoch)
    share = epoch / reference_updates_per_epoch
    updates = None if reference_updates is None else math.ceil(reference_updates * share)

    return RegimePlan(
        reference_batch_size=reference_batch_size,
        batch_size=batch_size,
        lr_rule=rule,
        lr_factor=factor_of(lr_rule, batch_size / reference_batch_size) if lr_factor is None else lr_factor,
        train_longer=train_longer,
        reference_updates_per_epoch=reference_updates_per_epoch,
        updates_per_epoch=updates_per_epoch,
        samples=samples,
        drop_last=drop_last,
        reference_epochs=max_epochs,
        epochs=None if max_epochs is None or updates is None else math.ceil(updates / updates_per_epoch),
        min_epochs=math.floor(min_epochs * epoch / updates_per_epoch),
        reference_updates=reference_updates,
        updates=updates,
    )
