"""Figures for reports, drawn once for light and dark: the SVG takes its colours from the page that holds it."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_gap.extras import library

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "DASHES",
    "SERIES",
    "Curve",
    "as_png",
    "as_svg",
    "cloud",
    "curves",
    "dots",
    "log_law",
    "movements",
    "overlay",
    "scatter",
    "style",
]

# The colours of the light theme; `as_svg` replaces each by the page's custom property of that name.
INK, MUTED, GRID, MID, PAPER = "#1d2430", "#656d78", "#ebe8e1", "#8d9096", "#fbfaf7"
SERIES = ("#6f7682", "#c2512f", "#2f68b0", "#0f8a6d", "#8a5aa8", "#a8801a", "#1d8aa5", "#b3477c")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
_PROPERTIES = {INK: "ink", MUTED: "muted", GRID: "grid", MID: "mid", PAPER: "paper"} | {
    colour: f"s{i}" for i, colour in enumerate(SERIES)
}
_SIZE = (5.2, 3.5)


@dataclass(frozen=True)
class Curve:
    """One named line: ``(n,)`` values, or ``(seeds, n)``, of which the mean is drawn and the range as a band."""

    label: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    colour: str


@contextmanager
def style() -> Iterator[None]:
    """Draw with the report's type sizes and colours inside the ``with`` block, and nowhere else."""
    mpl = library("matplotlib", "a report", "plots")
    rc: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "lightning_gap",
        "font.size": 10,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": MUTED,
        "axes.titlecolor": INK,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "grid.color": GRID,
        "grid.linewidth": 0.9,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "text.color": INK,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.8,
        "figure.constrained_layout.use": True,
        "path.simplify_threshold": 0.5,
    }
    with mpl.rc_context(rc):
        yield


def _new(size: tuple[float, float] = _SIZE, *, logx: bool = False, **labels: str) -> "tuple[Figure, Axes]":
    # A Figure of its own instead of pyplot: no global state, no window, no backend chosen for the user.
    figure = library("matplotlib.figure", "a report", "plots").Figure(figsize=size)
    figure.patch.set_alpha(0.0)
    axes = figure.subplots()
    axes.patch.set_alpha(0.0)
    axes.set(**labels, **({"xscale": "log"} if logx else {}))
    return figure, axes


def as_svg(figure: "Figure") -> str:
    """Return the figure as inline SVG whose colours follow the page."""
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    # Groups are named alike in every figure, and one page holds several.
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])
    for colour, name in _PROPERTIES.items():
        text = text.replace(colour, f"var(--{name}, {colour})")
    return text


def as_png(figure: "Figure", *, dpi: int = 200) -> bytes:
    """Return the figure as PNG on the light theme's paper; 200 dots an inch suit a screen of double density."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png", dpi=dpi, facecolor=PAPER)
    return buffer.getvalue()


def dots(values: Mapping[str, Sequence[float]], colours: Sequence[str], *, xlabel: str, digits: int = 2) -> "Figure":
    """Return one line a run: a dot for each seed, a bar at the mean, the mean written out."""
    with style():
        figure, axes = _new((_SIZE[0], 0.8 + 0.72 * len(values)), xlabel=xlabel)
        for row, ((label, numbers), colour) in enumerate(zip(values.items(), colours, strict=False)):
            mean = float(np.mean(numbers))
            axes.plot(numbers, [row] * len(numbers), "o", color=colour, ms=7.5, alpha=0.55, mec="none")
            axes.plot([mean, mean], [row - 0.2, row + 0.2], color=colour, lw=3, solid_capstyle="round")
            where: Any = {"xytext": (0, 14), "xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            axes.annotate(label, (0, row), **where, color=INK, weight="bold", size=9.5)
            axes.annotate(f"{mean:.{digits}f}", (1, row), **where, ha="right", color=colour, weight="bold")
        axes.set_ylim(len(values) - 0.55, -0.85)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.08)
    return figure


def curves(
    lines: Sequence[Curve], *, xlabel: str, ylabel: str, logx: bool = False, floor_quantile: float | None = None
) -> "Figure":
    """Return lines over a common axis, with a band from the lowest to the highest seed.

    The ordinate is cut below a quantile of all values, so that the first steps do not flatten the rest.
    """
    with style():
        figure, axes = _new(logx=logx, xlabel=xlabel, ylabel=ylabel)
        for line in lines:
            seeds = np.atleast_2d(line.y)
            axes.plot(line.x, seeds.mean(0), color=line.colour, label=line.label, marker="o", ms=3.2)
            axes.fill_between(line.x, seeds.min(0), seeds.max(0), color=line.colour, alpha=0.16, lw=0)
        if floor_quantile is not None:
            everything = np.concatenate([np.ravel(line.y) for line in lines])
            top, low = everything.max(), np.quantile(everything, floor_quantile)
            axes.set_ylim(low - 0.05 * (top - low), top + 0.08 * (top - low))
        axes.legend(loc="lower right")
    return figure


def overlay(
    lines: Sequence[Curve],
    styles: Sequence[int],
    *,
    xlabel: str,
    ylabel: str,
    logx: bool = False,
    logy: bool = False,
    wide: bool = False,
    laws: Sequence[tuple[float, float, float, float] | None] = (),
    floor_quantile: float | None = None,
) -> "Figure":
    """Return many lines over a common axis without a legend: the colours repeat after eight, with other dashes.

    ``styles`` are places in :data:`SERIES`, and beyond these in :data:`DASHES`. A law ``(a, b, first, last)`` is drawn
    as ``a + b·log x`` between these abscissae. The ordinate is cut at a quantile of all values and at as much from the
    other side.
    """
    with style():
        figure, axes = _new((10.4, 4.2) if wide else _SIZE, logx=logx, xlabel=xlabel, ylabel=ylabel)
        for index, line in zip(styles, lines, strict=True):
            few = len(line.x) <= 40
            axes.plot(
                line.x, line.y, color=SERIES[index % len(SERIES)], ls=DASHES[index // len(SERIES) % len(DASHES)],
                lw=1.6, marker="o" if few else None, ms=3.4, mec="none",
            )  # fmt: skip
        for index, law in enumerate(laws):
            if law is not None:
                intercept, slope, first, last = law
                t = np.geomspace(first, last, 60)
                axes.plot(t, intercept + slope * np.log(t), color=INK, lw=0.9, ls=(0, (4, 2)), zorder=3 + index)
        if logy:
            axes.set_yscale("log")
        elif floor_quantile is not None and lines:
            everything = np.concatenate([line.y for line in lines])
            low, high = np.quantile(everything, [floor_quantile, 1 - floor_quantile])
            inside = everything[(everything >= low) & (everything <= high)]
            if len(inside) and high > low:
                margin = 0.08 * (high - low)
                axes.set_ylim(low - margin, high + margin)
    return figure


def scatter(points: Sequence[tuple[float, float]], styles: Sequence[int], *, xlabel: str, ylabel: str) -> "Figure":
    """Return one dot a run over a logarithmic abscissa to base 2, in the colours of :func:`overlay`."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    with style():
        figure, axes = _new(xlabel=xlabel, ylabel=ylabel)
        for index, (x, y) in zip(styles, points, strict=True):
            axes.plot([x], [y], "o", ms=9, alpha=0.85, mec="none", color=SERIES[index % len(SERIES)])
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(sorted({x for x, _ in points})))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.margins(x=0.12, y=0.15)
    return figure


def log_law(lines: Sequence[Curve], laws: Sequence[tuple[float, float]], *, xlabel: str, ylabel: str) -> "Figure":
    """Return distances over the logarithm of the update, each with its law ``(a, b)``, ``a + b·log t``, dashed."""
    with style():
        figure, axes = _new(logx=True, xlabel=xlabel, ylabel=ylabel)
        for line, (intercept, slope) in zip(lines, laws, strict=True):
            axes.plot(line.x, line.y, "o", color=line.colour, ms=3.6, mec="none", alpha=0.85, label=line.label)
            axes.plot(line.x, intercept + slope * np.log(line.x), color=line.colour, lw=1.1, ls=(0, (4, 2)))
        axes.set_ylim(bottom=0.0)
        axes.legend(loc="upper left")
    return figure


def _plane(colours: NDArray[np.float64]) -> NDArray[np.float64]:
    """Project RGB colours on the plane of red minus blue (cool to warm) and mean brightness."""
    return np.stack([colours[:, 0] - colours[:, 2], colours.mean(1)], axis=1)


def _colour_axes(axes: "Axes") -> None:
    # Mid grey behind the points: black and white ones are both seen, in either theme.
    axes.patch.set(alpha=1.0, facecolor=MID)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    axes.set(xlim=(-0.8, 1.05), ylim=(-0.04, 1.04), xlabel="cool – red minus blue – warm", ylabel="brightness")
    axes.set_xticks([])
    axes.set_yticks([])


def cloud(colours: NDArray[np.float64]) -> "Figure":
    """Return ``(n, 3)`` RGB colours in [0, 1] as a cloud of points in their own colours, clipped for display."""
    with style():
        figure, axes = _new((2.7, 2.5))
        _colour_axes(axes)
        where = _plane(colours)
        axes.scatter(where[:, 0], where[:, 1], s=3.5, c=np.clip(colours, 0, 1), lw=0, rasterized=True)
    return figure


def movements(before: NDArray[np.float64], after: NDArray[np.float64]) -> "Figure":
    """Return where each ``(n, 3)`` RGB colour goes: a line to its image, which is drawn as a point."""
    from matplotlib.collections import LineCollection

    with style():
        figure, axes = _new((4.2, 3.6))
        _colour_axes(axes)
        start, end = _plane(before), _plane(after)
        axes.add_collection(
            LineCollection(list(np.stack([start, end], axis=1)), colors=np.clip(before, 0, 1), lw=0.7, alpha=0.8)
        )
        axes.scatter(end[:, 0], end[:, 1], s=9, c=np.clip(after, 0, 1), lw=0)
    return figure
