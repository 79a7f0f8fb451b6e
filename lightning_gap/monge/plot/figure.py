"""The figure of a map."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from lightning_gap.checks import check_choice, check_integer
from lightning_gap.extras import library
from lightning_gap.monge.plot.panels import Space, array_of, components, limits_of, panels_of, space_of
from lightning_gap.monge.plot.plane import draw_line, draw_plane
from lightning_gap.monge.plot.sphere import centre_of, draw_sphere
from lightning_gap.monge.plot.style import THEMES, Theme, draw_legend, style
from lightning_gap.monge.samples.features import columns_like

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_map"]

Samples = ArrayLike | Tensor | Sequence[Tensor]

_MOST_PANELS = 9
_NAMES = {1: ("x",), 2: ("x₁", "x₂")}


def plot_map(
    source: Samples,
    mapped: Samples,
    target: Samples,
    *,
    basis: ArrayLike | Tensor | None = None,
    space: Space = "auto",
    feature_names: Sequence[str] | None = None,
    conditions: Sequence[str] | None = None,
    title: str | None = None,
    arrows: int = 80,
    max_points: int = 2000,
    theme: Theme = "light",
) -> "Figure":
    r"""Return a figure of a map: source and target samples, the images, and arrows from source to image.

    ============== =================================================================================================
    ``line``       d = 1: the graph of the map beside the identity, between the histograms of the source (above) and
                   of target and images (at the side)
    ``plane``      d = 2: points and arrows
    ``sphere``     d = 3, unit vectors: two hemispheres in Lambert's azimuthal projection, which keeps areas; arrows
                   are great circles; the first is centred on the data
    ``components`` d > 2: the first two principal components of the target; the axes say how much of its variance
                   they hold
    ============== =================================================================================================

    Limits hold 99 % of source and target, and 90 % of the images, along each axis; what lies beyond is counted in a
    corner. The same samples give the same figure, and no random number generator moves.

    Args:
        source: ``(n, d)`` samples; or ``(K, n, d)`` for K conditions, or a list of K sets of any sizes: up to nine
            panels with common axes.
        mapped: Their images, of the same shape. Those that are not finite are left out.
        target: ``(m, d)``, ``(K, m, d)`` or K sets of samples of the target.
        basis: Samples ``(k, d)`` that the principal components are fitted to; the target's by default.
        space: One of the table above; by default what the samples are.
        feature_names: Names of the d features, for the axes.
        conditions: Names of the conditions.
        title: A line above the figure.
        arrows: Most arrows in a panel, spread evenly over the source.
        max_points: Most points of each set in a panel, in a fixed choice.
        theme: ``"light"`` or ``"dark"``.

    Returns:
        A figure of its own: it is not known to pyplot, and opens no window.

    Raises:
        ModuleNotFoundError: Matplotlib is not installed.
        ValueError: Shapes do not fit, or an option is not known or does not suit the samples.

    Example:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=(200, 2))
        >>> figure = plot_map(x, 2 * x + 3, 2 * x[::-1] + 3)
        >>> [axes.get_xlabel() for axes in figure.axes]
        ['x₁']
    """
    figure_class = library("matplotlib.figure", "plot_map", "plots").Figure
    mapped, target, basis = (
        columns_like(name, given, source, "source")
        for name, given in (("mapped", mapped), ("target", target), ("basis", basis))
    )
    panels = panels_of(source, mapped, target, conditions)
    chosen = space_of(space, panels)
    check_choice("theme", theme, get_args(Theme))
    check_integer("arrows", arrows, 0)
    check_integer("max_points", max_points)
    dim = panels[0].source.shape[1]
    if feature_names is not None and len(feature_names) != dim:
        raise ValueError(f"feature_names has {len(feature_names)} names for {dim} features")
    shown = panels[:_MOST_PANELS]
    names = [str(name) for name in feature_names or _NAMES.get(dim, ())]
    if chosen == "components":
        fitted_to = np.concatenate([p.target for p in panels]) if basis is None else array_of("basis", basis, (2,))
        if fitted_to.shape[1] != dim:
            raise ValueError(f"basis has {fitted_to.shape[1]} features, but the samples have {dim}")
        axes_of, names = components(fitted_to, basis is None)
        shown = [p.through(axes_of) for p in shown]
    shown = [p.at_most(max_points) for p in shown]

    columns = min(len(shown), 3 if len(shown) > 4 else 2)
    rows = -(-len(shown) // columns)
    width, height = {"line": (4.6, 4.4), "sphere": (6.4, 3.6)}.get(chosen, (4.8, 4.6))
    scale = 1.15 if len(shown) == 1 else 0.78
    with style(theme):
        size = (columns * width * scale, rows * height * scale + 0.5)
        figure: Figure = figure_class(figsize=size, dpi=150, layout="constrained")
        parts = np.asarray(figure.subfigures(rows, columns, squeeze=False, wspace=0.02, hspace=0.02)).ravel()
        common = centre_of(shown) if chosen == "sphere" else limits_of(shown, equal=chosen != "line")
        for part, panel in zip(parts, shown, strict=False):
            if chosen == "line":
                draw_line(part, panel, common, names[0])
            elif chosen == "sphere":
                draw_sphere(part, panel, common, arrows, scale)
            else:
                draw_plane(part, panel, common, names, arrows, scale)
            if panel.name is not None:
                part.suptitle(panel.name, size=10, weight="bold", color=THEMES[theme]["ink"])
        heading = [title] if title else []
        if len(panels) > len(shown):
            heading.append(f"{len(shown)} of {len(panels)} conditions")
        if heading:
            figure.suptitle(" — ".join(heading), size=11, x=0.012, ha="left", weight="bold")
        draw_legend(figure, panels, chosen)
    return figure
