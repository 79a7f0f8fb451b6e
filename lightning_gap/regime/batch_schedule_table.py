"""The table that says what a batch schedule will do."""

import math
from bisect import bisect_left, bisect_right
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.table import Table

from lightning_gap.regime.batch_schedule_run import ScheduledRun
from lightning_gap.regime.callback import PREFIX
from lightning_gap.regime.reference_schedulers import RolledOut
from lightning_gap.regime.rules.factor import rule_name
from lightning_gap.regime.rules.hyperparameters import OptimizerRules
from lightning_gap.trainer.loggers import log_facts, log_table
from lightning_gap.trainer.terminal import say

__all__ = ["COLUMNS", "forecast", "report"]

COLUMNS = ("", "reference run", "this run")
_POINTS = 5


def forecast(run: ScheduledRun) -> list[tuple[int, int]] | None:
    """Return the samples before each update of the run and its batch; ``None`` where they are not known."""
    if run.schedule.adaptive or run.plan.end is None or run.plan.clock.samples is None:
        return None
    (epochs, rest), found = run.plan.end, []
    for epoch in range(epochs + bool(rest)):
        found += [(run.plan.clock.seen(epoch, begins), batch) for begins, _, batch in run.plan.updates((epoch, 0))]
    return found


@rank_zero_only
def report(run: ScheduledRun, rolled: list[RolledOut], rules: OptimizerRules) -> None:
    """Print what the schedule will do, and log it."""
    rows, facts = _rows(run, rolled, rules)
    table = Table(title="Batch-size schedule", title_justify="left")
    for name in COLUMNS:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    say(table)
    log_facts(run.trainer.loggers, PREFIX, facts)
    if run.averages is not None:
        run.averages.warn_of_starts(lambda update: _update_after(run, update))
    log_table(run.trainer.loggers, f"{PREFIX}batch_schedule", COLUMNS, rows)


def _rows(run: ScheduledRun, rolled: list[RolledOut], rules: OptimizerRules) -> tuple[list[tuple[str, str, str]], Any]:
    base, rule = run.plan.clock.batch_size, rule_name(rules.lr)
    way = "the loader's batches" if run.plan.by_loader else "accumulation of the loader's batches"
    rows = [("batch", str(base), run.schedule.name), ("by", "", way), ("learning rate", "1", f"{rule} of the ratio")]
    for name, kept in (("weight decay", rules.weight_decay), ("betas", rules.betas_rule), ("momentum", rules.momentum)):
        if kept != "none":
            rows.append((name, "1", rule_name(kept)))
    facts: dict[str, Any] = {
        "batch_schedule": run.schedule.name, "reference_batch_size": base, "lr_rule": rule,
        "max_batch_size": run.owner.max_batch_size, "max_device_batch_size": run.owner.max_device_batch_size,
    }  # fmt: skip
    updates, averages = forecast(run), run.averages
    if averages is not None:
        rows += averages.rows(None if updates is None else max(batch for _, batch in updates) / base)
        facts["ema_rule"] = averages.name
    if updates is None:
        most = run.owner.max_batch_size
        rows.append(("largest batch", str(base), "" if most is None else f"{most} at most"))
        return rows, facts
    reference = run.plan.last or 1
    saved = f"{len(updates)} ({1 - len(updates) / reference:.1%} fewer)"
    largest = max(batch for _, batch in updates)
    device = -(-largest // run.plan.replicas)
    parts = run.owner.max_device_batch_size
    device = device if parts is None else min(device, parts)
    rows += [
        ("updates", str(reference), saved),
        ("largest batch", str(base), str(largest)),
        ("largest of a device", "", str(device)),
    ]
    facts |= {"reference_updates": reference, "updates": len(updates), "largest_batch_size": largest}
    last = updates[-1][0]
    points = [bisect_right(updates, (last * at // (_POINTS - 1), math.inf)) - 1 for at in range(_POINTS)]
    for samples, batch in (updates[at] for at in dict.fromkeys(points)):
        factor = _factor(run, rules, batch / base)
        rate = _rate(run, rolled, samples)
        there = "" if rate is None else f"{rate:.4g}"
        here = f"batch {batch}, rate {f'x{factor:.4g}' if rate is None else f'{rate * factor:.4g}'}"
        rows.append((f"after {samples} samples", there, here))
    return rows, facts


def _factor(run: ScheduledRun, rules: OptimizerRules, ratio: float) -> float:
    """Return what the first group's rate is multiplied by at a batch."""
    first = next((each for each in run.trainer.optimizers if each.param_groups), None)
    rescaling = rules.rescaling(ratio, ratio)
    return rescaling.lr_factor if first is None else rescaling.rate_factor(first, first.param_groups[0])


def _rate(run: ScheduledRun, rolled: list[RolledOut], samples: int) -> float | None:
    """Return the reference run's learning rate after some samples, where it is known."""
    groups = run.trainer.optimizers[0].param_groups if run.trainer.optimizers else []
    if not rolled:
        return float(groups[0]["lr"]) if groups and groups[0].get("lr") is not None else None
    _, clock, seen = rolled[0]
    if not seen.rates or run.plan.clock.samples is None:
        return None
    update = run.plan.clock.update(*divmod(samples, run.plan.clock.samples))
    return seen.rates[min(clock.steps_until(update), len(seen.rates) - 1)]


def _update_after(run: ScheduledRun, update: int) -> int | None:
    """Return after how many updates of this run the samples of so many of the reference run are seen, if known."""
    updates = forecast(run)
    if updates is None:
        return None
    return bisect_left(updates, (run.clock.seen(*run.clock.place(update)), 0))
