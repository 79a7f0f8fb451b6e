"""A plan in words: a line for each thing, the reference run beside this run."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_gap.regime.plan import RegimePlan

__all__ = ["table_rows"]


def table_rows(plan: "RegimePlan") -> list[tuple[str, str, str]]:
    """Return a plan line by line: what, in the reference run, in this run."""
    rows = [
        ("batch (samples per update)", f"{plan.reference_batch_size}", f"{plan.batch_size}"),
        ("ratio", "1", f"{plan.ratio:g}"),
    ]
    for index, (reference, now) in enumerate(plan.learning_rates):
        label = f"learning rate, group {index} ({plan.rule_told}, x{plan.lr_factor:.4g})"
        rows.append((label, f"{reference:.6g}", f"{now:.6g}"))
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
