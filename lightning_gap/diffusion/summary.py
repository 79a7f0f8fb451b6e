"""Where results go that outlive the run: the terminal and the loggers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from lightning_gap.diffusion.fit import DiffusionFit
from lightning_gap.diffusion.plot import plot_diffusion
from lightning_gap.diffusion.reference import ReferenceRun
from lightning_gap.extras import library
from lightning_gap.trainer.loggers import log_figure, log_table

__all__ = ["laws_to_log", "publish", "summary"]


def laws_to_log(fit: DiffusionFit) -> dict[str, float]:
    """Return the numbers of a fit, and what draws its laws again."""
    laws = ("log_intercept", "power_coefficient", "first_update", "last_update")
    return fit.numbers() | {name: getattr(fit, name) for name in laws}


def summary(fit: DiffusionFit, *, varied: bool) -> Table:
    """Return both laws as a table for the terminal."""
    span = f"updates {fit.first_update:g} to {fit.last_update:g}, {fit.points} points"
    rate = "the learning rate varied: read with care" if varied else "at constant learning rate"
    table = Table("law", "fit", f"{fit.confidence:.0%} interval", "R²", "Akaike weight")
    table.title = f"‖w_t − w_0‖ over {span}, {rate}"
    log = f"{fit.log_intercept:.4g} + {fit.log_slope:.4g}·log t"
    power = f"{fit.power_coefficient:.4g}·t^{fit.power_exponent:.4g}"
    slope, exponent = _range(fit.log_slope_interval), _range(fit.power_exponent_interval)
    table.add_row("ultra-slow", log, f"slope {slope}", f"{fit.log_r2:.4f}", f"{fit.log_weight:.3f}")
    table.add_row("power", power, f"exponent {exponent}", f"{fit.power_r2:.4f}", f"{1 - fit.log_weight:.3f}")
    name = "ultra-slow" if fit.preferred == "log" else "power"
    alpha = f"; α = {fit.alpha:.3g} ({_range(fit.alpha_interval)})" if math.isfinite(fit.alpha) else ""
    table.caption = f"preferred: {name}{alpha}"
    return table


def _range(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.3g} to {interval[1]:.3g}"


def publish(
    loggers: Iterable[Any],
    prefix: str,
    step: int,
    trace: Mapping[str, Sequence[float]],
    fit: DiffusionFit | None,
    reference: ReferenceRun | None,
) -> None:
    """Send the trace as a table, and its figure, to the loggers."""
    loggers = list(loggers)
    rows = [list(row) for row in zip(*trace.values(), strict=True)]
    log_table(loggers, f"{prefix}trace", list(trace), rows, step)
    log_figure(loggers, f"{prefix}figure", lambda: _figure(trace, fit, reference), step)


def _figure(trace: Mapping[str, Sequence[float]], fit: DiffusionFit | None, reference: ReferenceRun | None) -> Any:
    """Return a figure that no window shows."""
    figure = library("matplotlib.figure", "a figure for the loggers", "plots").Figure(
        figsize=(7, 4.5), layout="constrained"
    )
    plot_diffusion(trace, fit, reference, ax=figure.add_subplot())
    return figure
