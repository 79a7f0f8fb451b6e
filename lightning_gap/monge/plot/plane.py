"""Panels of one and of two dimensions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_gap.monge.plot.panels import Array, Panel
from lightning_gap.monge.plot.style import MAPPED, SOURCE, TARGET, count_outside, draw_arrows, draw_points, ink, spread

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

__all__ = ["draw_line", "draw_plane"]


def draw_plane(part: "SubFigure", panel: Panel, limits: Array, names: Sequence[str], arrows: int, scale: float) -> None:
    """Draw points, and arrows from source to image."""
    axes = part.subplots()
    draw_points(axes, panel, scale)
    inside = [((x >= limits[0]) & (x <= limits[1])).all(1) for x in panel.sets]
    from_here = np.flatnonzero(inside[0] & np.isfinite(panel.mapped).all(1))
    rows = from_here[spread(panel.source[from_here], arrows)]
    start, end = panel.source[rows], panel.mapped[rows]
    draw_arrows(axes, start, end - start, scale)
    span = limits[1] - limits[0]
    axes.set(xlim=limits[:, 0], ylim=limits[:, 1], xlabel=names[0], ylabel=names[1])
    if np.isclose(span[0], span[1]):
        axes.set_aspect("equal")
    count_outside(axes, inside)


def draw_line(part: "SubFigure", panel: Panel, limits: Array, name: str) -> None:
    """Draw the graph of the map, between the histograms of the sets."""
    grid = part.add_gridspec(2, 2, width_ratios=(4, 1), height_ratios=(1, 4), wspace=0.02, hspace=0.02)
    axes = part.add_subplot(grid[1, 0])
    above, beside = part.add_subplot(grid[0, 0], sharex=axes), part.add_subplot(grid[1, 1], sharey=axes)
    x, mapped, y = (values[:, 0] for values in panel.sets)
    low, high = limits[:, 0]
    bins = np.linspace(low, high, 41).tolist()
    axes.plot([low, high], [low, high], color=ink(axes), lw=0.8, ls=(0, (4, 3)), zorder=1)
    axes.annotate(
        "identity", (low + 0.97 * (high - low),) * 2, (-3, 3), textcoords="offset points", size=7.5, ha="right",
        color=ink(axes), rotation=45, rotation_mode="anchor", transform_rotates_text=True,
    )  # fmt: skip
    levels = (np.arange(200) + 0.5) / 200
    axes.plot(np.quantile(x, levels), np.quantile(y, levels), color=TARGET, lw=3.2, alpha=0.55, zorder=2)
    order = np.argsort(x, kind="stable")
    axes.plot(x[order], mapped[order], ".-", color=MAPPED, lw=1.1, ms=3, mec="none", zorder=3)
    axes.set(xlim=(low, high), ylim=(low, high), xlabel=name, ylabel=f"T({name})")
    options: dict[str, Any] = {"bins": bins, "density": True, "histtype": "stepfilled", "lw": 0}
    above.hist(x, color=SOURCE, alpha=0.75, **options)
    beside.hist(y, color=TARGET, alpha=0.6, orientation="horizontal", **options)
    finite = mapped[np.isfinite(mapped)]
    if len(finite):
        beside.hist(finite, bins=bins, density=True, histtype="step", color=MAPPED, lw=1.4, orientation="horizontal")
    for side in (above, beside):
        side.axis("off")
    inside = [(values >= low) & (values <= high) for values in (x, mapped, y)]
    count_outside(axes, inside)
