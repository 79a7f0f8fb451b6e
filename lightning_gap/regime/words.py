"""A plan in words: its table, and what is worth a thought in it, measured in docs/results and not guessed."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lightning_gap.regime.rules.auto import AUTO

if TYPE_CHECKING:
    from lightning_gap.regime.plan import RegimePlan

__all__ = ["advice", "table_rows"]

# From here on a ratio is large: 32 was measured, and 8 was not.
_LARGE = 16.0


def table_rows(plan: "RegimePlan") -> list[tuple[str, str, str]]:
    """Return a plan line by line: what, in the reference run, in this run."""
    rows = [
        ("batch (samples per update)", f"{plan.reference_batch_size}", f"{plan.batch_size}"),
        ("ratio", "1", f"{plan.ratio:g}"),
    ]
    for index, (reference, now) in enumerate(plan.learning_rates):
        label = f"learning rate, group {index} ({plan.rule_told}, x{plan.lr_factor:.4g})"
        if plan.momentum_rule != "none" and reference and not math.isclose(now / reference, plan.lr_factor):
            label = f"{label[:-1]}, x{now / reference / plan.lr_factor:.4g} for the momentum)"
        rows.append((label, f"{reference:.6g}", f"{now:.6g}"))
    if plan.why:
        rows.append((f'lr_rule="{plan.lr_rule}"', "", plan.why))
    rows += plan.hyperparameters
    rows += [
        (f"learning rate, {share} % of the way", f"update {then}: {rate:.4g}", f"update {update}: {now:.4g}")
        for share, (then, rate, update, now) in zip((0, 25, 50, 75, 100), plan.curve, strict=False)
    ]
    rows += _length_rows(plan)
    for line in (*map(str, plan.schedulers), *plan.companions):
        name, _, fate = line.partition(": ")
        rows.append((name, "", fate))
    if plan.clip_norm is not None:
        until = "always" if plan.clip_updates is None else f"up to update {plan.clip_updates}"
        rows.append(("gradient norm clipped", "", f"{plan.clip_norm:g}, {until}"))
    if plan.warmup_updates:
        rows.append(("warm-up from the reference rate", "", f"{plan.warmup_updates} updates"))
    if plan.noise_variance:
        rows.append(("gradient noise", "", f"sample weights of variance {plan.noise_variance:g}"))
    return rows


def _length_rows(plan: "RegimePlan") -> list[tuple[str, str, str]]:
    rows = []
    if plan.updates is not None or plan.updates_per_epoch is not None:
        rows.append(("updates", _limit(plan.reference_updates), _limit(plan.updates)))
    if plan.updates_per_epoch is not None:
        rows.append(("updates per epoch", f"{plan.reference_updates_per_epoch}", f"{plan.updates_per_epoch}"))
        rows.append(("epochs", _limit(plan.reference_epochs), _limit(plan.epochs)))
        last = [_last_batch(plan, batch) for batch in (plan.reference_batch_size, plan.batch_size)]
        if any(last):
            rows.append(("smaller last batch", last[0] or "none", last[1] or "none"))
    there, here = plan.reference_samples_seen, plan.samples_seen
    if there and here:
        rows.append(("samples, and so the cost", f"{there}", f"{here}: {here / there:.3g} times"))
    return rows


def _last_batch(plan: "RegimePlan", batch: int) -> str:
    samples = plan.small_last_batch(batch)
    updates = math.ceil((plan.samples or 0) / batch)
    return f"{samples} samples, {100 / updates:.2g} % of the updates" if samples else ""


def _limit(count: int | None) -> str:
    return "no limit" if count is None else str(count)


def advice(
    plan: "RegimePlan", *, batchnorm: bool = False, ghosts: bool = False, measures: bool = False
) -> Iterator[str]:
    """Yield what is doubtful or dear in a plan, a sentence each.

    ``measures`` says that the run measures a noise scale, and that none was given.

    Example:
        >>> from lightning_gap.regime import plan_regime
        >>> plan = plan_regime(reference_batch_size=128, batch_size=4096, samples=50_000, max_epochs=50)
        >>> print(*advice(plan))
        The run sees 30.1 times the samples of the reference run: train_longer=0.1 makes it 4.1 times.
    """
    there, here = plan.reference_samples_seen, plan.samples_seen
    if there and here and here / there >= 8 and plan.train_longer > 0.1:
        least = 1 + 0.1 * (plan.ratio - 1)
        yield (
            f"The run sees {here / there:.3g} times the samples of the reference run: train_longer=0.1 makes it "
            f"{least:.2g} times."
        )
    if plan.rule_told == "sqrt" and not plan.train_longer and plan.ratio >= _LARGE:
        yield (
            f'At the reference run\'s samples and the ratio {plan.ratio:g}, lr_rule="sqrt" did worse than no scaling: '
            'try lr_rule="none" or train_longer=0.1.'
        )
    if plan.rule_told == "linear" and not plan.warmup_updates and plan.ratio > 1:
        yield 'lr_rule="linear" without a warm-up is apt to diverge: pass warmup_updates, five epochs in its paper.'
    if measures and plan.lr_rule == AUTO and plan.lr_factor != 1:
        yield (
            'lr_rule="auto" chooses before training: what GradientNoiseScale measures in this run is for the next one, '
            "as noise_scale=."
        )
    if batchnorm and not ghosts and plan.ratio > 1:
        yield (
            f"The model has BatchNorm, whose statistics are those of the large batch: GhostBatchNorm("
            f"{plan.reference_batch_size}) keeps the reference run's."
        )
    last, updates = plan.small_last_batch(plan.batch_size), plan.updates_per_epoch
    if last and updates and updates <= 4 and 2 * last < plan.batch_size:
        yield (
            f"1 in {updates} updates is over {last} samples, at the rate of {plan.batch_size}: drop_last=True in the "
            "DataLoader leaves it out."
        )
