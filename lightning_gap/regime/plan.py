"""The plan of a large-batch regime: what the reference run does, and what this run has to do to match it."""

import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from rich.table import Table

__all__ = ["PLAN_COLUMNS", "RegimePlan", "plan_regime", "updates_in_epoch"]

# The headings of a plan's table.
PLAN_COLUMNS = ("", "reference", "now")

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
        reference_updates_per_epoch: Updates in one epoch of the reference run; ``None`` unless ``train_longer``, or
            where the loader has no length.
        updates_per_epoch: Updates in one epoch of this run; ``None`` in the same cases.
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
        schedulers: One line a scheduler: its class and what becomes of it.
        companions: One line for all else that counts epochs: what it is and what becomes of it.
    """

    reference_batch_size: int
    batch_size: int
    lr_rule: str
    lr_factor: float
    train_longer: float = 0.0
    reference_updates_per_epoch: int | None = None
    updates_per_epoch: int | None = None
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
    schedulers: tuple[str, ...] = ()
    companions: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """This run's batch over the reference batch."""
        return self.batch_size / self.reference_batch_size

    @property
    def moment_ratio(self) -> float:
        """What Adam's rule multiplies 1 − β by; 1 under other rules."""
        return self.ratio if self.lr_rule == "adam" else 1.0

    @property
    def stretched_epoch(self) -> Fraction | None:
        """In how many updates of this run a reference epoch passes; ``None`` where epochs have no known length."""
        if self.updates_per_epoch is None or self.reference_updates_per_epoch is None:
            return None
        here = self.updates_per_epoch
        return here + Fraction(self.train_longer) * (self.reference_updates_per_epoch - here)

    @property
    def pace(self) -> Fraction:
        """How many updates of the reference run pass in one of this run; 1 if ``train_longer`` is 0 or 1."""
        epoch, there = self.stretched_epoch, self.reference_updates_per_epoch
        return Fraction(1) if epoch is None or there is None or not self.train_longer else there / epoch

    @property
    def reclocked(self) -> bool:
        """Whether epochs of this run and of the reference run hold different numbers of updates."""
        return bool(self.train_longer) and self.reference_updates_per_epoch != self.updates_per_epoch

    @property
    def stretch(self) -> Fraction:
        """How many epochs of this run a reference epoch takes; 1 unless ``train_longer``."""
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

    def reference_epochs_in(self, updates: int) -> int:
        """Return how many epochs of the reference run are over after some updates of this run.

        Args:
            updates: Updates behind it.
        """
        return math.floor(updates / (self.stretched_epoch or math.inf))

    def epochs_from(self, epoch: int, update: int) -> int:
        """Return how many epochs this run needs in all if, after some, it has made some of its updates.

        Args:
            epoch: Epochs behind it, one cut short counted whole.
            update: Updates behind it.
        """
        return epoch + math.ceil(((self.updates or 0) - update) / (self.updates_per_epoch or 1))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain Python, for a checkpoint or ``logger.log_hyperparams``."""
        facts = asdict(self)
        facts["learning_rates"] = [list(pair) for pair in self.learning_rates]
        for name in ("schedulers", "companions"):
            facts[name] = list(facts[name])
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
        return [
            f"{name} was {saved.get(name)!r} and is {getattr(self, name)!r}"
            for name in names
            if saved.get(name) != getattr(self, name)
        ]

    def rows(self) -> list[tuple[str, str, str]]:
        """Return the plan line by line: what, in the reference run, in this run."""
        rows = [
            ("batch (samples per update)", f"{self.reference_batch_size}", f"{self.batch_size}"),
            ("ratio", "1", f"{self.ratio:g}"),
        ]
        for index, (reference, now) in enumerate(self.learning_rates):
            label = f"learning rate, group {index} ({self.lr_rule}, x{self.lr_factor:.4g})"
            rows.append((label, f"{reference:.6g}", f"{now:.6g}"))
        if self.train_longer:
            rows.append(("updates", _limit(self.reference_updates), _limit(self.updates)))
            if self.updates_per_epoch is not None:
                rows.append(("updates per epoch", f"{self.reference_updates_per_epoch}", f"{self.updates_per_epoch}"))
                rows.append(("epochs", _limit(self.reference_epochs), _limit(self.epochs)))
        for line in (*self.schedulers, *self.companions):
            name, _, fate = line.partition(": ")
            rows.append((name, "", fate))
        if self.clip_norm is not None:
            until = "always" if self.clip_updates is None else f"up to update {self.clip_updates}"
            rows.append(("gradient norm clipped", "", f"{self.clip_norm:g}, {until}"))
        if self.warmup_updates:
            rows.append(("warm-up from the reference rate", "", f"{self.warmup_updates} updates"))
        if self.noise_variance:
            rows.append(("gradient noise", "", f"sample weights of variance {self.noise_variance:g}"))
        return rows

    def table(self) -> Table:
        """Return the plan as a table, the reference run beside this run."""
        table = Table(*PLAN_COLUMNS, title="Large-batch regime", title_justify="left")
        for row in self.rows():
            table.add_row(*row)
        return table


def _limit(count: int | None) -> str:
    return "no limit" if count is None else str(count)


def updates_in_epoch(samples: int, batch_size: int, *, drop_last: bool = False) -> int:
    """Return how many batches one pass over the samples gives: ⌈N/B⌉, or ⌊N/B⌋ where the last is dropped.

    Args:
        samples: Samples in one pass, N.
        batch_size: Samples in one batch, B.
        drop_last: Whether an incomplete last batch is dropped.

    Example:
        >>> updates_in_epoch(50_000, 128), updates_in_epoch(50_000, 4096), updates_in_epoch(50_000, 128, drop_last=True)
        (391, 13, 390)
    """
    return samples // batch_size if drop_last else math.ceil(samples / batch_size)


def plan_regime(
    *,
    reference_batch_size: int,
    batch_size: int,
    lr_rule: str,
    lr_factor: float,
    reference_updates_per_epoch: int,
    updates_per_epoch: int,
    max_epochs: int | None,
    max_steps: int | None = None,
    min_epochs: int = 0,
    train_longer: float = 1.0,
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
        lr_rule: The name of the learning-rate rule.
        lr_factor: What every learning rate is multiplied by.
        reference_updates_per_epoch: Updates in one epoch of the reference run, :math:`U_S`.
        updates_per_epoch: Updates in one epoch of this run, :math:`U_L`.
        max_epochs: The reference run's epochs, E; ``None`` for no limit.
        max_steps: The reference run's limit of updates; ``None`` for no limit.
        min_epochs: The reference run's least number of epochs.
        train_longer: How far to go from the reference run's epochs to its updates, :math:`\lambda` in (0, 1].

    Returns:
        The plan.

    Raises:
        ValueError: If an epoch of either run has no update.

    References:
        Hoffer, Hubara, Soudry 2017, "Train longer, generalize better", section 5 (regime adaptation).

    Example:
        >>> plan = plan_regime(
        ...     reference_batch_size=128, batch_size=4096, lr_rule="sqrt", lr_factor=32**0.5,
        ...     reference_updates_per_epoch=391, updates_per_epoch=13, max_epochs=50,
        ... )
        >>> plan.updates, plan.epochs, plan.stops_within_epoch
        (19550, 1504, True)
    """
    if reference_updates_per_epoch < 1 or updates_per_epoch < 1:
        raise ValueError(
            f"an epoch has {reference_updates_per_epoch} updates at reference_batch_size={reference_batch_size} and "
            f"{updates_per_epoch} at the batch size {batch_size}: both must be at least 1. Use a smaller batch, or "
            "drop_last=False in the DataLoader."
        )
    limits = [] if max_epochs is None else [max_epochs * reference_updates_per_epoch]
    limits += [] if max_steps is None else [max_steps]
    reference_updates = min(limits, default=None)
    epoch = updates_per_epoch + Fraction(train_longer) * (reference_updates_per_epoch - updates_per_epoch)
    share = epoch / reference_updates_per_epoch
    updates = None if reference_updates is None else math.ceil(reference_updates * share)

    return RegimePlan(
        reference_batch_size=reference_batch_size,
        batch_size=batch_size,
        lr_rule=lr_rule,
        lr_factor=lr_factor,
        train_longer=float(train_longer),
        reference_updates_per_epoch=reference_updates_per_epoch,
        updates_per_epoch=updates_per_epoch,
        reference_epochs=max_epochs,
        epochs=None if max_epochs is None or updates is None else math.ceil(updates / updates_per_epoch),
        min_epochs=math.floor(min_epochs * epoch / updates_per_epoch),
        reference_updates=reference_updates,
        updates=updates,
    )
