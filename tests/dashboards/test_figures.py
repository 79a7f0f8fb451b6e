"""Figures: what is drawn is what was given, in the page's colours."""

import re

import numpy as np
import pytest

from lightning_gap.dashboards import figures

mpl = pytest.importorskip("matplotlib")
X = np.arange(1.0, 20.0)


def _all():
    line = figures.Curve("line", X, np.stack([np.log(X), np.log(X) + 1]), figures.SERIES[1])
    single = figures.Curve("single", X, 2 + 3 * np.log(X), figures.SERIES[2])
    colours = np.random.default_rng(0).random((50, 3))
    return {
        "dots": figures.dots({"a": [1.0, 2.0], "b": [3.0]}, figures.SERIES, xlabel="x"),
        "curves": figures.curves([line, single], xlabel="x", ylabel="y", logx=True, floor_quantile=0.1),
        "log_law": figures.log_law([single], [(2.0, 3.0)], xlabel="t", ylabel="‖wₜ − w₀‖"),
        "cloud": figures.cloud(colours),
        "movements": figures.movements(colours, colours * 0.5),
    }


@pytest.mark.parametrize("name", ["dots", "curves", "log_law", "cloud", "movements"])
def test_svg_takes_its_colours_from_the_page(name):
    svg = figures.as_svg(_all()[name])
    assert svg.startswith("<svg")
    assert "var(--" in svg
    for colour in figures.SERIES:
        assert colour not in re.sub(r"var\(--\w+, #\w+\)", "", svg)


def test_svg_is_the_same_every_time():
    assert figures.as_svg(_all()["curves"]) == figures.as_svg(_all()["curves"])


def test_png_is_png():
    assert figures.as_png(_all()["dots"], dpi=50).startswith(b"\x89PNG")


def test_the_mean_and_every_seed_are_drawn():
    axes = _all()["dots"].axes[0]
    dots, bar = axes.lines[0], axes.lines[1]
    assert list(dots.get_xdata()) == [1.0, 2.0]
    assert list(bar.get_xdata()) == [1.5, 1.5]


def test_the_law_is_drawn_where_it_says():
    points, law = _all()["log_law"].axes[0].lines
    np.testing.assert_allclose(law.get_ydata(), points.get_ydata())


def test_a_movement_starts_at_the_colour_and_ends_at_its_image():
    before, after = np.array([[1.0, 0.5, 0.0]]), np.array([[0.0, 0.5, 1.0]])
    (segment,) = figures.movements(before, after).axes[0].collections[0].get_segments()
    np.testing.assert_allclose(segment, [[1.0, 0.5], [-1.0, 0.5]])


def test_the_style_stays_inside():
    before = dict(mpl.rcParams)
    _all()
    assert dict(mpl.rcParams) == before
