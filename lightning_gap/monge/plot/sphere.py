"""Panels of the sphere: two hemispheres in Lambert's azimuthal projection, and great circles."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_gap.monge.plot.panels import Array, Panel
from lightning_gap.monge.plot.style import draw_arrows, draw_points, ink, spread

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

__all__ = ["centre_of", "disc", "draw_sphere", "great_circles"]

_ARC_POINTS = 24


def centre_of(panels: Sequence[Panel]) -> Array:
    """Return an orthonormal frame as rows: towards the data, east and north of there."""
    mean = np.concatenate([x for p in panels for x in (p.source, p.target)]).mean(0)
    towards = mean / np.linalg.norm(mean) if np.linalg.norm(mean) > 0.05 else np.array([1.0, 0.0, 0.0])
    east = np.cross([0.0, 0.0, 1.0], towards)
    east = east / np.linalg.norm(east) if np.linalg.norm(east) > 1e-6 else np.array([0.0, 1.0, 0.0])
    return np.stack([towards, east, np.cross(towards, east)])


def disc(points: Array, frame: Array) -> Array:
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


def great_circles(start: Array, end: Array) -> Array:
    """Return ``(n, points, 3)`` points along the shortest arcs."""
    angle = 2 * np.arctan2(np.linalg.norm(start - end, axis=1), np.linalg.norm(start + end, axis=1))[:, None, None]
    t = np.linspace(0, 1, _ARC_POINTS)[None, :, None]
    small = angle < 1e-6
    sine = np.where(small, 1.0, np.sin(angle))
    first = np.where(small, 1 - t, np.sin((1 - t) * angle) / sine)
    last = np.where(small, t, np.sin(t * angle) / sine)
    return first * start[:, None] + last * end[:, None]


def draw_sphere(part: "SubFigure", panel: Panel, frame: Array, arrows: int, scale: float) -> None:
    """Draw two hemispheres with points, and great circles from source to image."""
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Circle

    here = np.isfinite(panel.mapped).all(1)
    source, mapped = panel.source[here], panel.mapped[here]
    rows = spread(source, arrows)
    arcs = great_circles(source[rows], mapped[rows])
    turn = np.linspace(-180, 180, 181)
    lines = [_on_sphere(turn, lat) for lat in range(-60, 90, 30)] + [
        _on_sphere(lon, np.linspace(-90, 90, 91)) for lon in range(-180, 180, 30)
    ]
    both = part.subplots(1, 2)
    for axes, half in zip(both, (frame, frame * np.array([[-1.0], [-1.0], [1.0]])), strict=True):
        grid = axes.xaxis.get_gridlines()[0].get_color()
        axes.axis("off")
        axes.add_patch(Circle((0, 0), 1, fill=False, ec=ink(axes), lw=0.8, zorder=1))
        axes.add_collection(LineCollection([disc(line, half) for line in lines], colors=grid, lw=0.7, zorder=0))
        draw_points(axes, Panel(disc(source, half), disc(mapped, half), disc(panel.target, half), None), scale)
        paths = disc(arcs, half)
        axes.add_collection(LineCollection(list(paths), colors=ink(axes), lw=0.8 * scale, alpha=0.5, zorder=3))
        tips = paths[:, -1] - paths[:, -2]
        length = np.linalg.norm(tips, axis=1)
        ends = (length > 1e-4) & np.isfinite(length)
        heads = 0.05 * tips[ends] / length[ends, None]
        draw_arrows(axes, paths[ends, -1] - heads, heads, scale)
        towards = half[0]
        latitude = float(np.degrees(np.arcsin(np.clip(towards[2], -1, 1))))
        longitude = float(np.degrees(np.arctan2(towards[1], towards[0])))
        ns, ew = "S" if latitude < -0.5 else "N", "W" if longitude < -0.5 else "E"
        axes.set(xlim=(-1.04, 1.04), ylim=(-1.04, 1.04), aspect="equal")
        axes.set_title(f"around {abs(latitude):.0f}° {ns}, {abs(longitude):.0f}° {ew}", color=ink(axes))
