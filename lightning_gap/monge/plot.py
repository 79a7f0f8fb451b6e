"""A map as a picture: source, target, images, and arrows from source to image."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lightning_gap.checks import check_integer
from lightning_gap.monge.samples.features import columns_like

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["Space", "Theme", "plot_map"]

Array = NDArray[np.float64]
Samples = ArrayLike | Tensor | Sequence[Tensor]
Space = Literal["auto", "line", "plane", "sphere", "components"]
Theme = Literal["light", "dark"]

# Grey, orange and blue: apart for each kind of colour blindness, in lightness too, and seen on white and on black.
_SOURCE, _TARGET, _MAPPED = "#868c96", "#e08a1e", "#2f7fd0"
_THEMES: dict[str, dict[str, str]] = {
    "light": {"paper": "#ffffff", "ink": "#1d2430", "muted": "#5d6570", "grid": "#e9ebee"},
    "dark": {"paper": "#14171c", "ink": "#eceef1", "muted": "#a3aab4", "grid": "#2b3038"},
}
_MOST_PANELS = 9
# The axes hold this part of each set; points beyond them are counted.
_SHOWN = 0.99
_IMAGES_SHOWN = 0.9
_ARC_POINTS = 24


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
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plot_map needs matplotlib: pip install 'lightning_gap[plots]'") from error

    mapped, target, basis = (
        columns_like(name, given, source, "source")
        for name, given in (("mapped", mapped), ("target", target), ("basis", basis))
    )
    panels = _panels(source, mapped, target, conditions)
    chosen = _space(space, panels)
    if theme not in get_args(Theme):
        raise ValueError(f"theme must be one of {', '.join(get_args(Theme))}, got {theme!r}")
    check_integer("arrows", arrows, 0)
    check_integer("max_points", max_points)
    dim = panels[0].source.shape[1]
    if feature_names is not None and len(feature_names) != dim:
        raise ValueError(f"feature_names has {len(feature_names)} names for {dim} features")
    shown = panels[:_MOST_PANELS]
    names = [str(name) for name in feature_names or ([f"x{_SUBSCRIPTS[k]}" for k in range(1, 3)] if dim <= 2 else [])]
    if dim == 1 and not feature_names:
        names = ["x"]
    if chosen == "components":
        fitted_to = np.concatenate([p.target for p in panels]) if basis is None else _array("basis", basis, (2,))
        if fitted_to.shape[1] != dim:
            raise ValueError(f"basis has {fitted_to.shape[1]} features, but the samples have {dim}")
        axes_of, names = _components(fitted_to, basis is None)
        shown = [p.through(axes_of) for p in shown]
    shown = [p.at_most(max_points) for p in shown]

    columns = min(len(shown), 3 if len(shown) > 4 else 2)
    rows = -(-len(shown) // columns)
    width, height = {"line": (4.6, 4.4), "sphere": (6.4, 3.6)}.get(chosen, (4.8, 4.6))
    scale = 1.15 if len(shown) == 1 else 0.78
    with _style(theme):
        size = (columns * width * scale, rows * height * scale + 0.5)
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        parts = np.asarray(figure.subfigures(rows, columns, squeeze=False, wspace=0.02, hspace=0.02)).ravel()
        limits = None if chosen == "sphere" else _limits(shown, equal=chosen != "line")
        if chosen == "sphere":
            centre = _centre(shown)
            for part, panel in zip(parts, shown, strict=False):
                _draw_sphere(part, panel, centre, arrows, scale)
        else:
            assert limits is not None
            for part, panel in zip(parts, shown, strict=False):
                if chosen == "line":
                    _draw_line(part, panel, limits, names[0])
                else:
                    _draw_plane(part, panel, limits, names, arrows, scale)
        for part, panel in zip(parts, shown, strict=False):
            if panel.name is not None:
                part.suptitle(panel.name, size=10, weight="bold", color=_THEMES[theme]["ink"])
        heading = title or ""
        if len(panels) > len(shown):
            heading += f"{' — ' if heading else ''}{len(shown)} of {len(panels)} conditions"
        if heading:
            figure.suptitle(heading, size=11, x=0.012, ha="left", weight="bold")
        _legend(figure, panels, chosen)
    return figure


_SUBSCRIPTS = "₀₁₂"


@dataclass(frozen=True)
class _Panel:
    """One condition's samples."""

    source: Array
    mapped: Array
    target: Array
    name: str | None

    def through(self, axes_of: Any) -> "_Panel":
        return _Panel(axes_of(self.source), axes_of(self.mapped), axes_of(self.target), self.name)

    def at_most(self, most: int) -> "_Panel":
        pairs, target = _some(len(self.source), most), _some(len(self.target), most)
        return _Panel(self.source[pairs], self.mapped[pairs], self.target[target], self.name)

    @property
    def sets(self) -> tuple[Array, Array, Array]:
        return self.source, self.mapped, self.target


def _some(size: int, most: int) -> NDArray[np.int64]:
    """Return a fixed choice of rows, in their order."""
    if size <= most:
        return np.arange(size)
    return np.sort(np.random.default_rng(0).permutation(size)[:most])


def _array(name: str, samples: ArrayLike | Tensor, dims: tuple[int, ...]) -> Array:
    array = np.asarray(
        samples.detach().cpu().double().numpy() if isinstance(samples, Tensor) else samples, dtype=np.float64
    )
    if array.ndim not in dims or array.size == 0:
        kinds = "(n, d)" if dims == (2,) else "(n, d), or (K, n, d) for conditions"
        raise ValueError(f"{name} must have shape {kinds} and not be empty, got {array.shape}")
    return array


def _sets(name: str, samples: Any) -> tuple[list[Array], bool]:
    """Return the samples of each condition, and whether there are conditions."""
    if isinstance(samples, list | tuple) and samples and all(np.ndim(one) == 2 for one in samples):
        return [_array(f"{name}[{k}]", one, (2,)) for k, one in enumerate(samples)], True
    array = _array(name, samples, (2, 3))
    return ([array], False) if array.ndim == 2 else (list(array), True)


def _panels(source: Any, mapped: Any, target: Any, conditions: Sequence[str] | None) -> list[_Panel]:
    (x, several), (y, y_several), (z, z_several) = (
        _sets(name, samples) for name, samples in (("source", source), ("mapped", mapped), ("target", target))
    )
    if not len(x) == len(y) == len(z) or not several == y_several == z_several:
        raise ValueError(f"source, mapped and target have {len(x)}, {len(y)} and {len(z)} conditions: they must agree")
    if conditions is not None and (not several or len(conditions) != len(x)):
        raise ValueError(f"conditions has {len(conditions)} names for {len(x) if several else 'no'} conditions")
    names = conditions or [f"condition {k}" for k in range(len(x))]
    panels = []
    for k, (first, image, second) in enumerate(zip(x, y, z, strict=True)):
        where = f"[{k}]" if several else ""
        if image.shape != first.shape:
            raise ValueError(f"mapped{where} has shape {image.shape} but source {first.shape}: they are paired by row")
        if not first.shape[1] == second.shape[1] == x[0].shape[1]:
            raise ValueError(f"target{where} has {second.shape[1]} features, but source{where} {first.shape[1]}")
        for name, samples in (("source", first), ("target", second)):
            if not np.isfinite(samples).all():
                raise ValueError(f"{name}{where} holds NaN or infinity: remove these samples")
        image = np.where(np.isfinite(image).all(1, keepdims=True), image, np.nan)
        panels.append(_Panel(first, image, second, str(names[k]) if several else None))
    return panels


def _space(space: str, panels: Sequence[_Panel]) -> str:
    if space not in get_args(Space):
        raise ValueError(f"space must be one of {', '.join(get_args(Space))}, got {space!r}")
    dim = panels[0].source.shape[1]
    on_sphere = dim == 3 and all(
        bool(np.all(np.abs(np.linalg.norm(x[np.isfinite(x).all(1)], axis=1) - 1) < 1e-3))
        for p in panels
        for x in p.sets
    )
    if space == "auto":
        return "line" if dim == 1 else "plane" if dim == 2 else "sphere" if on_sphere else "components"
    suits = {"line": dim == 1, "plane": dim == 2, "sphere": on_sphere, "components": dim >= 2}
    if not suits[space]:
        needs = {"line": "1 feature", "plane": "2 features", "sphere": "unit vectors of 3", "components": "2 or more"}
        raise ValueError(f"space={space!r} needs {needs[space]}, got {dim} features: use space='auto'")
    return space


def _components(samples: Array, of_target: bool) -> tuple[Any, list[str]]:
    """Return a function to the first two principal components, and the names of the axes."""
    mean = samples.mean(0)
    _, s, rows = np.linalg.svd(samples - mean, full_matrices=len(samples) < 2)
    rows = rows[:2]
    # A sign that does not depend on the linear algebra library.
    rows = rows * np.sign(rows[np.arange(2), np.abs(rows).argmax(1)] + 0.0)[:, None]
    total = float((s**2).sum())
    shares = [float(s[k] ** 2) / total if total > 0 and k < len(s) else 0.0 for k in range(2)]
    of = "target" if of_target else "basis"
    names = [f"component {k + 1} of the {of} ({100 * share:.3g} % of its variance)" for k, share in enumerate(shares)]
    return (lambda x: (x - mean) @ rows.T), names


def _limits(panels: Sequence[_Panel], *, equal: bool) -> Array:
    """Return ``(2, d)`` lower and upper limits that a few points far away do not move."""
    given = np.concatenate([x for p in panels for x in (p.source, p.target)])
    images = np.concatenate([p.mapped for p in panels])
    images = images[np.isfinite(images).all(1)]
    low, high = np.quantile(given, [(1 - _SHOWN) / 2, (1 + _SHOWN) / 2], axis=0)
    if len(images):
        ends = np.quantile(images, [(1 - _IMAGES_SHOWN) / 2, (1 + _IMAGES_SHOWN) / 2], axis=0)
        low, high = np.minimum(low, ends[0]), np.maximum(high, ends[1])
    span = high - low
    flat = span <= 1e-9 * np.maximum(1.0, np.abs(high))
    span = np.where(flat, span.max() if not flat.all() else 1.0, span)
    middle = (low + high) / 2
    if equal and span.max() < 8 * span.min():
        span = np.full_like(span, span.max())
    return np.stack([middle - 0.55 * span, middle + 0.55 * span])


@contextmanager
def _style(theme: str) -> Iterator[None]:
    import matplotlib as mpl

    colours = _THEMES[theme]
    rc: Any = {
        "font.size": 9,
        "figure.facecolor": colours["paper"],
        "savefig.facecolor": colours["paper"],
        "axes.facecolor": colours["paper"],
        "axes.edgecolor": colours["muted"],
        "axes.labelcolor": colours["muted"],
        "axes.titlecolor": colours["ink"],
        "axes.titlesize": 9,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.7,
        "grid.color": colours["grid"],
        "grid.linewidth": 0.7,
        "xtick.color": colours["muted"],
        "ytick.color": colours["muted"],
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "text.color": colours["ink"],
        "legend.frameon": False,
        "legend.fontsize": 9,
        "legend.labelcolor": colours["ink"],
        "patch.edgecolor": colours["muted"],
    }
    with mpl.rc_context(rc):
        yield


def _ink(axes: "Axes") -> Any:
    return axes.xaxis.label.get_color()


def _spread(points: Array, count: int) -> NDArray[np.int64]:
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


def _points(axes: "Axes", panel: _Panel, scale: float) -> None:
    """Draw the three sets: the target wide and pale, as ground for the images, small and full."""
    size = scale**2 * float(np.clip(5000 / max(len(panel.source), len(panel.target)), 2.5, 16))
    axes.scatter(panel.source[:, 0], panel.source[:, 1], s=0.7 * size, c=_SOURCE, alpha=0.55, lw=0, zorder=2)
    axes.scatter(panel.target[:, 0], panel.target[:, 1], s=2.4 * size, c=_TARGET, alpha=0.48, lw=0, zorder=1.5)
    axes.scatter(panel.mapped[:, 0], panel.mapped[:, 1], s=0.9 * size, c=_MAPPED, alpha=0.85, lw=0, zorder=4)


def _count_outside(axes: "Axes", outside: int, total: int) -> None:
    if outside:
        axes.text(
            0.99, 0.01, f"{outside} of {total} points outside", transform=axes.transAxes, ha="right", va="bottom",
            size=7.5, color=_ink(axes),
        )  # fmt: skip


def _draw_plane(
    part: "SubFigure", panel: _Panel, limits: Array, names: Sequence[str], arrows: int, scale: float
) -> None:
    axes = part.subplots()
    _points(axes, panel, scale)
    inside = [((x >= limits[0]) & (x <= limits[1])).all(1) for x in panel.sets]
    from_here = np.flatnonzero(inside[0] & np.isfinite(panel.mapped).all(1))
    rows = from_here[_spread(panel.source[from_here], arrows)]
    start, end = panel.source[rows], panel.mapped[rows]
    axes.quiver(
        *start.T, *(end - start).T, angles="xy", scale_units="xy", scale=1, color=_ink(axes), alpha=0.5,
        units="inches", width=0.011 * scale, headwidth=4.6, headlength=5.6, headaxislength=5, zorder=3,
    )  # fmt: skip
    span = limits[1] - limits[0]
    axes.set(xlim=limits[:, 0], ylim=limits[:, 1], xlabel=names[0], ylabel=names[1])
    if np.isclose(span[0], span[1]):
        axes.set_aspect("equal")
    _count_outside(axes, sum(int((~here).sum()) for here in inside), sum(len(x) for x in panel.sets))


def _draw_line(part: "SubFigure", panel: _Panel, limits: Array, name: str) -> None:
    grid = part.add_gridspec(2, 2, width_ratios=(4, 1), height_ratios=(1, 4), wspace=0.02, hspace=0.02)
    axes = part.add_subplot(grid[1, 0])
    above, beside = part.add_subplot(grid[0, 0], sharex=axes), part.add_subplot(grid[1, 1], sharey=axes)
    x, mapped, y = (values[:, 0] for values in panel.sets)
    low, high = limits[:, 0]
    bins = np.linspace(low, high, 41).tolist()
    axes.plot([low, high], [low, high], color=_ink(axes), lw=0.8, ls=(0, (4, 3)), zorder=1)
    axes.annotate(
        "identity", (low + 0.97 * (high - low),) * 2, (-3, 3), textcoords="offset points", size=7.5, ha="right",
        color=_ink(axes), rotation=45, rotation_mode="anchor", transform_rotates_text=True,
    )  # fmt: skip
    levels = (np.arange(200) + 0.5) / 200
    axes.plot(np.quantile(x, levels), np.quantile(y, levels), color=_TARGET, lw=3.2, alpha=0.55, zorder=2)
    order = np.argsort(x, kind="stable")
    axes.plot(x[order], mapped[order], ".-", color=_MAPPED, lw=1.1, ms=3, mec="none", zorder=3)
    axes.set(xlim=(low, high), ylim=(low, high), xlabel=name, ylabel=f"T({name})")
    options: dict[str, Any] = {"bins": bins, "density": True, "histtype": "stepfilled", "lw": 0}
    above.hist(x, color=_SOURCE, alpha=0.75, **options)
    beside.hist(y, color=_TARGET, alpha=0.6, orientation="horizontal", **options)
    finite = mapped[np.isfinite(mapped)]
    if len(finite):
        beside.hist(finite, bins=bins, density=True, histtype="step", color=_MAPPED, lw=1.4, orientation="horizontal")
    for side in (above, beside):
        side.axis("off")
    inside = [(values >= low) & (values <= high) for values in (x, mapped, y)]
    _count_outside(axes, sum(int((~here).sum()) for here in inside), sum(len(values) for values in inside))


def _centre(panels: Sequence[_Panel]) -> Array:
    """Return an orthonormal frame as rows: towards the data, east and north of there."""
    mean = np.concatenate([x for p in panels for x in (p.source, p.target)]).mean(0)
    towards = mean / np.linalg.norm(mean) if np.linalg.norm(mean) > 0.05 else np.array([1.0, 0.0, 0.0])
    east = np.cross([0.0, 0.0, 1.0], towards)
    east = east / np.linalg.norm(east) if np.linalg.norm(east) > 1e-6 else np.array([0.0, 1.0, 0.0])
    return np.stack([towards, east, np.cross(towards, east)])


def _disc(points: Array, frame: Array) -> Array:
    """Return ``(..., 2)`` points in Lambert's azimuthal projection with the unit circle as rim; NaN on the far half."""
    depth, east, north = np.moveaxis(points @ frame.T, -1, 0)
    near = depth >= 0
    stretch = np.where(near, 1 / np.sqrt(1 + np.where(near, depth, 0)), np.nan)
    return np.stack([east * stretch, north * stretch], axis=-1)


def _on_sphere(longitude: Any, latitude: Any) -> Array:
    longitude, latitude = np.broadcast_arrays(np.radians(longitude), np.radians(latitude))
    return np.stack(
        [np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)], axis=-1
    )


def _great_circles(start: Array, end: Array) -> Array:
    """Return ``(n, points, 3)`` points along the shortest arcs."""
    angle = 2 * np.arctan2(np.linalg.norm(start - end, axis=1), np.linalg.norm(start + end, axis=1))[:, None, None]
    t = np.linspace(0, 1, _ARC_POINTS)[None, :, None]
    small = angle < 1e-6
    sine = np.where(small, 1.0, np.sin(angle))
    first = np.where(small, 1 - t, np.sin((1 - t) * angle) / sine)
    last = np.where(small, t, np.sin(t * angle) / sine)
    return first * start[:, None] + last * end[:, None]


def _draw_sphere(part: "SubFigure", panel: _Panel, frame: Array, arrows: int, scale: float) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Circle

    here = np.isfinite(panel.mapped).all(1)
    source, mapped = panel.source[here], panel.mapped[here]
    rows = _spread(source, arrows)
    arcs = _great_circles(source[rows], mapped[rows])
    turn = np.linspace(-180, 180, 181)
    lines = [_on_sphere(turn, lat) for lat in range(-60, 90, 30)] + [
        _on_sphere(lon, np.linspace(-90, 90, 91)) for lon in range(-180, 180, 30)
    ]
    both = part.subplots(1, 2)
    for axes, half in zip(both, (frame, frame * np.array([[-1.0], [-1.0], [1.0]])), strict=True):
        grid = axes.xaxis.get_gridlines()[0].get_color()
        axes.axis("off")
        axes.add_patch(Circle((0, 0), 1, fill=False, ec=_ink(axes), lw=0.8, zorder=1))
        axes.add_collection(LineCollection([_disc(line, half) for line in lines], colors=grid, lw=0.7, zorder=0))
        _points(axes, _Panel(_disc(source, half), _disc(mapped, half), _disc(panel.target, half), None), scale)
        paths = _disc(arcs, half)
        axes.add_collection(LineCollection(list(paths), colors=_ink(axes), lw=0.8 * scale, alpha=0.5, zorder=3))
        tips = paths[:, -1] - paths[:, -2]
        length = np.linalg.norm(tips, axis=1)
        ends = (length > 1e-4) & np.isfinite(length)
        heads = 0.05 * tips[ends] / length[ends, None]
        axes.quiver(
            *(paths[ends, -1] - heads).T, *heads.T, angles="xy", scale_units="xy", scale=1, color=_ink(axes), alpha=0.5,
            units="inches", width=0.011 * scale, headwidth=4.6, headlength=5.6, headaxislength=5, zorder=3,
        )  # fmt: skip
        towards = half[0]
        latitude = float(np.degrees(np.arcsin(np.clip(towards[2], -1, 1))))
        longitude = float(np.degrees(np.arctan2(towards[1], towards[0])))
        ns, ew = "S" if latitude < -0.5 else "N", "W" if longitude < -0.5 else "E"
        axes.set(xlim=(-1.04, 1.04), ylim=(-1.04, 1.04), aspect="equal")
        axes.set_title(f"around {abs(latitude):.0f}° {ns}, {abs(longitude):.0f}° {ew}", color=_ink(axes))


def _legend(figure: "Figure", panels: Sequence[_Panel], space: str) -> None:
    from matplotlib.lines import Line2D

    sizes = [sum(len(p.sets[k]) for p in panels) for k in range(3)]
    dot: dict[str, Any] = {"marker": "o", "ls": "", "mec": "none"}
    handles = [
        Line2D([], [], color=_SOURCE, ms=5, label=f"source ({sizes[0]})", **dot),
        Line2D([], [], color=_MAPPED, ms=5, label="its images", **dot),
        Line2D([], [], color=_TARGET, ms=7, alpha=0.6, label=f"target ({sizes[2]})", **dot),
    ]
    if space == "line":
        handles.append(Line2D([], [], color=_TARGET, lw=3.2, alpha=0.55, label="monotone rearrangement"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2 if space == "line" else 3, handletextpad=0.3)
