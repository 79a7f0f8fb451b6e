"""Colours, and what all panels have: points, arrows, the legend, and how many points are out of sight."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_gap.monge.plot.panels import Array, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Theme", "count_outside", "draw_arrows", "draw_legend", "draw_points", "ink", "spread", "style"]

Theme = Literal["light", "dark"]

# Grey, orange and blue: apart for each kind of colour blindness, in lightness too, and seen on white and on black.
SOURCE, TARGET, MAPPED = "#868c96", "#e08a1e", "#2f7fd0"
THEMES: dict[str, dict[str, str]] = {
    "light": {"paper": "#ffffff", "ink": "#1d2430", "muted": "#5d6570", "grid": "#e9ebee"},
    "dark": {"paper": "#14171c", "ink": "#eceef1", "muted": "#a3aab4", "grid": "#2b3038"},
}
# What is drawn in which of them, and all else.
_COLOURED = {
    "paper": ("figure.facecolor", "savefig.facecolor", "axes.facecolor"),
    "ink": ("axes.titlecolor", "text.color", "legend.labelcolor"),
    "muted": ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "patch.edgecolor"),
    "grid": ("grid.color",),
}
_PLAIN: Any = {
    "font.size": 9, "axes.titlesize": 9, "legend.fontsize": 9, "legend.frameon": False, "axes.grid": True,
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7,
    "grid.linewidth": 0.7, "xtick.major.size": 0, "ytick.major.size": 0,
}  # fmt: skip


@contextmanager
def style(theme: str) -> Iterator[None]:
    """Draw in the colours of a theme within."""
    import matplotlib as mpl

    rc: Any = {key: THEMES[theme][role] for role, keys in _COLOURED.items() for key in keys}
    with mpl.rc_context(_PLAIN | rc):
        yield


def ink(axes: "Axes") -> Any:
    """Return the colour of lines and words."""
    return axes.xaxis.label.get_color()


def spread(points: Array, count: int) -> NDArray[np.int64]:
    """Return rows of points far from each other, beginning in the middle: each is the farthest from those before."""
    count = min(count, len(points))
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    rows = [int(np.linalg.norm(points - np.median(points, axis=0), axis=1).argmin())]
    distance = np.linalg.norm(points - points[rows[0]], axis=1)
    while len(rows) < count:
        rows.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(points - points[rows[-1]], axis=1))
    return np.asarray(rows)


def draw_points(axes: "Axes", panel: Panel, scale: float) -> None:
    """Draw the three sets: the target wide and pale, as ground for the images, small and full."""
    size = scale**2 * float(np.clip(5000 / max(len(panel.source), len(panel.target)), 2.5, 16))
    axes.scatter(panel.source[:, 0], panel.source[:, 1], s=0.7 * size, c=SOURCE, alpha=0.55, lw=0, zorder=2)
    axes.scatter(panel.target[:, 0], panel.target[:, 1], s=2.4 * size, c=TARGET, alpha=0.48, lw=0, zorder=1.5)
    axes.scatter(panel.mapped[:, 0], panel.mapped[:, 1], s=0.9 * size, c=MAPPED, alpha=0.85, lw=0, zorder=4)


def draw_arrows(axes: "Axes", start: Array, step: Array, scale: float) -> None:
    """Draw arrows in the units of the axes."""
    axes.quiver(
        *start.T, *step.T, angles="xy", scale_units="xy", scale=1, color=ink(axes), alpha=0.5,
        units="inches", width=0.011 * scale, headwidth=4.6, headlength=5.6, headaxislength=5, zorder=3,
    )  # fmt: skip


def count_outside(axes: "Axes", inside: Sequence[NDArray[np.bool_]]) -> None:
    """Say in a corner how many points are not shown."""
    total = sum(len(here) for here in inside)
    outside = total - sum(int(here.sum()) for here in inside)
    if outside:
        axes.text(
            0.99, 0.01, f"{outside} of {total} points outside", transform=axes.transAxes, ha="right", va="bottom",
            size=7.5, color=ink(axes),
        )  # fmt: skip


def draw_legend(figure: "Figure", panels: Sequence[Panel], space: str) -> None:
    """Draw what the colours mean, with the numbers of samples."""
    from matplotlib.lines import Line2D

    sizes = [sum(len(p.sets[k]) for p in panels) for k in range(3)]
    dot: dict[str, Any] = {"marker": "o", "ls": "", "mec": "none"}
    handles = [
        Line2D([], [], color=SOURCE, ms=5, label=f"source ({sizes[0]})", **dot),
        Line2D([], [], color=MAPPED, ms=5, label="its images", **dot),
        Line2D([], [], color=TARGET, ms=7, alpha=0.6, label=f"target ({sizes[2]})", **dot),
    ]
    if space == "line":
        handles.append(Line2D([], [], color=TARGET, lw=3.2, alpha=0.55, label="monotone rearrangement"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2 if space == "line" else 3, handletextpad=0.3)
