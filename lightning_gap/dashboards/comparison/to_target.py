"""The section of targets: what each run took to them, and which share of runs is within a factor of the best."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from lightning_gap.dashboards import figures
from lightning_gap.dashboards.comparison.compared import Compared, as_float, count
from lightning_gap.dashboards.report import Figure, Gallery, Legend, Section
from lightning_gap.dashboards.runs import Run
from lightning_gap.dashboards.table import Column, ResultTable, Row
from lightning_gap.dashboards.targets import HOLD, Target, performance_profile
from lightning_gap.dashboards.to_target import ToTarget, batch_of, runs_to_target

__all__ = ["targets_section"]

_COSTS: dict[str, Callable[[ToTarget], float | None]] = {
    "updates": lambda each: each.updates,
    "samples": lambda each: each.samples,
}


def targets_section(
    compared: Compared, targets: Sequence[Target], *, by: str = "batch", hold: int = HOLD, smooth: int = 1
) -> Section:
    """Return what runs took to targets, run by run, and the performance profiles of groups of runs.

    Args:
        compared: The runs.
        targets: At least one.
        by: ``"batch"``, samples per update, or a hyper-parameter: runs of one value are one line of the profile.
        hold: Points in a row at the target, as in :func:`~lightning_gap.dashboards.targets.first_held`.
        smooth: As there.

    Raises:
        ValueError: If there is no target, or no run logged the metric of one.
    """
    if not targets:
        raise ValueError("targets is empty: give at least one, as Target.parse('val_acc>=0.9')")
    for target in targets:
        if not any(target.metric in run.metrics for run in compared.runs):
            known = ", ".join(sorted({key for run in compared.runs for key in run.metrics})[:12])
            raise ValueError(f"target {target}: no run logged {target.metric}; logged are {known}")
    taken = runs_to_target(compared.runs, targets, hold=hold, smooth=smooth)
    blocks: list[ResultTable | Gallery | Legend] = [_table(row, hold) for row in taken]
    groups = _groups(compared.runs, by)
    drawn = [figure for cost in _COSTS if (figure := _profile(taken, groups, cost)) is not None]
    if drawn:
        blocks += [Legend(f"Runs by {by}", list(groups), list(range(len(groups)))), Gallery(drawn, 2)]
    pairs = [each for row in taken for each in row]
    held = sum(each.updates is not None for each in pairs)
    return Section(
        "To the target",
        f"{held} of {count(len(pairs), 'trial')}, a run and a target each, held it over {count(hold, 'point')}.",
        blocks,
        "Dahl et al. 2023 · Benchmarking neural network training algorithms",
    )


def _table(row: Sequence[ToTarget], hold: int) -> ResultTable:
    timed = any(each.seconds is not None for each in row)
    columns = [Column("Batch", 0), Column("Updates", 0, "min"), Column("Samples", 0, "min")]
    columns += [Column("Seconds", 1, "min")] if timed else []
    rows = []
    for each in row:
        values = [each.batch, each.updates, each.samples, *([each.seconds] if timed else [])]
        rows.append(Row(each.run.name, ["–" if value is None else value for value in values], each.outcome))
    caption = (
        f"When each run first was at the target or better, {count(hold, 'point')} in a row, on the straight line "
        "from the point before. Touched: it was there, but not for so long. Missed: never. The fewest are marked."
    )
    return ResultTable(f"To {row[0].target}", "Run", columns, rows, caption)


def _groups(runs: Sequence[Run], by: str) -> dict[str, list[int]]:
    """Return the places of runs by the value of a hyper-parameter, in order of the values."""
    values = [batch_of(run) if by == "batch" else run.config.get(by) for run in runs]
    found: dict[str, list[int]] = defaultdict(list)
    order = sorted(range(len(runs)), key=lambda i: (as_float(values[i]) is None, as_float(values[i]) or 0.0))
    for i in order:
        value = values[i]
        found[f"{by} not told" if value is None else f"{value:g}" if isinstance(value, float) else str(value)].append(i)
    return dict(found)


def _profile(taken: Sequence[Sequence[ToTarget]], groups: dict[str, list[int]], cost: str) -> Figure | None:
    """Return the profiles of all groups, None where there is nothing to compare."""
    costs = [[_COSTS[cost](each) for each in row] for row in taken]
    # A target that no run held tells runs apart by nothing.
    told = [row for row in costs if any(value is not None for value in row)]
    if not told or sum(value is not None for row in told for value in row) < 2:
        return None
    best = [min(value for value in row if value is not None) for row in told]
    last = max(value / least for row, least in zip(told, best, strict=True) for value in row if value is not None)
    lines = []
    for name, places in groups.items():
        factors, shares = performance_profile([[row[i] for i in places] for row in told], best)
        x = np.concatenate([[1.0], np.repeat(factors, 2), [max(1.05 * last, 1.1)]])
        y = np.concatenate([[0.0, 0.0], np.repeat(shares, 2)])
        lines.append(figures.Curve(name, x, y, figures.INK))
    figure = figures.overlay(
        lines, list(range(len(lines))), xlabel=f"τ, {cost} over the fewest", ylabel="share of trials", logx=True
    )
    ends = ", ".join(f"{line.label} ends at {line.y[-1]:.0%}" for line in lines)
    return Figure(
        figures.as_svg(figure),
        f"Which share of a group's trials held the target within τ times the fewest {cost} of any run. Higher and "
        "further left is better; what is missing to 1 never did.",
        f"Performance profile of {cost} to the target: {ends}",
        f"{cost.capitalize()} to the target",
    )
