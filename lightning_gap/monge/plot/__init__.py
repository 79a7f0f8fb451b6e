"""A map as a picture: source, target, images, and arrows from source to image."""

from lightning_gap.monge.plot.figure import plot_map
from lightning_gap.monge.plot.panels import Space
from lightning_gap.monge.plot.style import Theme

__all__ = ["Space", "Theme", "plot_map"]
