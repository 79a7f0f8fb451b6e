"""plot_map: what is drawn is what was given, in any dimension, and the same every time."""

import io

import numpy as np
import pytest
import torch

from lightning_gap.monge import plot_map

pytest.importorskip("matplotlib")
RNG = np.random.default_rng(5)


def normal(*shape):
    return RNG.normal(size=shape)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


X, Y = normal(60, 2), normal(40, 2) + 1
SETS = {
    "line": (normal(60, 1), normal(60, 1), normal(40, 1)),
    "plane": (X, X + 1, Y),
    "sphere": (unit(normal(60, 3)), unit(normal(60, 3)), unit(normal(40, 3))),
    "components": (normal(60, 5), normal(60, 5), normal(40, 5)),
}


def png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    return buffer.getvalue()


def panels(figure):
    return [axes for part in figure.subfigs for axes in part.axes]


def offsets(axes):
    """The three sets as drawn: source, target, images."""
    from matplotlib.collections import PathCollection

    return [np.asarray(c.get_offsets()) for c in axes.collections if isinstance(c, PathCollection)]


def quiver(axes):
    from matplotlib.quiver import Quiver

    (one,) = [c for c in axes.collections if isinstance(c, Quiver)]
    return one


@pytest.mark.parametrize("space", SETS)
def test_the_same_samples_give_the_same_figure_and_no_generator_moves(space):
    sets = SETS[space]
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    assert png(plot_map(*sets, max_points=30)) == png(plot_map(*sets, max_points=30, space=space))
    assert np.array_equal(np.random.get_state()[1], before[0])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])


def test_themes():
    light, dark = plot_map(*SETS["plane"]), plot_map(*SETS["plane"], theme="dark")
    assert light.get_facecolor()[:3] == (1, 1, 1)
    assert max(dark.get_facecolor()[:3]) < 0.2
    for figure, dim in ((light, True), (dark, False)):
        (axes,) = panels(figure)
        assert (sum(quiver(axes).get_facecolor()[0][:3]) < 1.5) == dim


def test_pyplot_does_not_know_the_figure():
    from matplotlib import pyplot

    plot_map(*SETS["plane"])
    assert pyplot.get_fignums() == []


def test_points_and_arrows_in_the_plane_are_those_given():
    figure = plot_map(torch.tensor(X), torch.tensor(X + 1, requires_grad=True), torch.tensor(Y), arrows=10)
    (axes,) = panels(figure)
    source, target, images = offsets(axes)
    np.testing.assert_allclose(source, X)
    np.testing.assert_allclose(target, Y)
    np.testing.assert_allclose(images, X + 1)
    drawn = quiver(axes)
    assert drawn.N == 10
    np.testing.assert_allclose([drawn.U, drawn.V], 1)
    assert {tuple(start) for start in np.asarray(drawn.XY)} <= {tuple(x) for x in X}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("x₁", "x₂")
    assert axes.get_aspect() == 1


def test_arrows_spread_over_the_source():
    dense = np.concatenate([0.01 * normal(60, 2), [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]] * 2])
    (axes,) = panels(plot_map(dense, dense + 1, dense, arrows=5))
    starts = np.asarray(quiver(axes).XY)
    assert sum(np.linalg.norm(start) > 0.5 for start in starts) == 4


def test_at_most_so_many_points_and_arrows():
    (axes,) = panels(plot_map(X, X + 1, Y, max_points=20, arrows=0))
    assert [len(points) for points in offsets(axes)] == [20, 20, 20]
    np.testing.assert_allclose(offsets(axes)[2], offsets(axes)[0] + 1)  # pairs stay pairs
    assert quiver(axes).N == 0


def test_points_far_away_do_not_move_the_limits_and_are_counted():
    far = X.copy()
    far[0] = 1e6
    (near,), (axes,) = panels(plot_map(X, X, Y)), panels(plot_map(X, far, Y))
    assert np.ptp(axes.get_xlim()) < 2 * np.ptp(near.get_xlim())
    (text,) = axes.texts
    inside = sum(
        int(
            ((p >= [axes.get_xlim()[0], axes.get_ylim()[0]]) & (p <= [axes.get_xlim()[1], axes.get_ylim()[1]]))
            .all(1)
            .sum()
        )
        for p in (X, far, Y)
    )
    assert text.get_text() == f"{160 - inside} of 160 points outside"


@pytest.mark.parametrize("space", SETS)
def test_images_that_are_not_finite_are_left_out(space):
    source, mapped, target = (x.copy() for x in SETS[space])
    mapped[3:9] = np.nan
    mapped[10] = np.inf
    assert png(plot_map(source, mapped, target, arrows=5))
    plot_map(source, np.full_like(mapped, np.nan), target)


@pytest.mark.parametrize("space", SETS)
def test_one_point_in_each_set(space):
    assert plot_map(*(x[:1] for x in SETS[space])).subfigs


def test_features_of_other_scales_keep_their_own():
    scale = np.array([1.0, 1000.0])
    (axes,) = panels(plot_map(X * scale, X * scale, Y * scale, feature_names=("CD4", "CD8")))
    assert axes.get_aspect() == "auto"
    assert np.ptp(axes.get_ylim()) > 100 * np.ptp(axes.get_xlim())
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("CD4", "CD8")


def test_components_are_those_of_the_target():
    rotation = np.linalg.qr(normal(5, 5))[0]
    target = normal(4000, 5) * np.array([4.0, 2.0, 0.5, 0.5, 0.5]) @ rotation + 7
    variances = np.sort(np.linalg.eigvalsh(np.cov(target.T)))[::-1]
    shares = 100 * variances / variances.sum()
    figure = plot_map(target, target, target, max_points=5000)
    (axes,) = panels(figure)
    assert axes.get_xlabel() == f"component 1 of the target ({shares[0]:.3g} % of its variance)"
    assert axes.get_ylabel() == f"component 2 of the target ({shares[1]:.3g} % of its variance)"
    drawn = offsets(axes)[1]
    np.testing.assert_allclose(np.cov(drawn.T), np.diag(variances[:2]), rtol=1e-6, atol=1e-6)
    (other,) = panels(plot_map(*SETS["components"], basis=target))
    assert other.get_xlabel().startswith("component 1 of the basis")


def test_the_graph_in_one_dimension():
    x = np.linspace(0, 1, 400)[:, None]
    figure = plot_map(x, 3 * x, 3 * x[::-1])
    axes = panels(figure)[0]
    identity, monotone, graph = (np.asarray(line.get_data()) for line in axes.lines)
    np.testing.assert_allclose(identity[0], identity[1])
    np.testing.assert_allclose(monotone[1], 3 * monotone[0], atol=1e-6)
    np.testing.assert_allclose(graph, [x[:, 0], 3 * x[:, 0]])


def test_arrows_on_the_sphere_aregreat_circles():
    from lightning_gap.monge.plot.sphere import disc, great_circles

    start, end = unit(normal(50, 3)), unit(normal(50, 3))
    arcs = great_circles(start, end)
    np.testing.assert_allclose(np.linalg.norm(arcs, axis=2), 1)
    np.testing.assert_allclose(arcs[:, 0], start, atol=1e-12)
    np.testing.assert_allclose(arcs[:, -1], end, atol=1e-12)
    np.testing.assert_allclose(np.einsum("npk,nk->np", arcs, np.cross(start, end)), 0, atol=1e-12)
    np.testing.assert_allclose(great_circles(start, start), np.repeat(start[:, None], 24, 1), atol=1e-9)
    # Equal areas: uniform points are uniform in the disc.
    points = disc(unit(normal(200_000, 3)), np.eye(3))
    near = points[np.isfinite(points[:, 0])]
    assert len(near) == pytest.approx(100_000, rel=0.02)
    assert np.mean(np.linalg.norm(near, axis=1) ** 2 < 0.5) == pytest.approx(0.5, abs=0.01)


def test_each_point_of_the_sphere_is_on_one_half():
    near, far = panels(plot_map(*SETS["sphere"]))
    for k, count in enumerate((60, 40, 60)):
        shown = [np.ma.filled(offsets(axes)[k].astype(float), np.nan) for axes in (near, far)]
        assert sum(int(np.isfinite(points).all(1).sum()) for points in shown) == count
    assert near.get_title().startswith("around")


def test_conditions_are_panels_of_any_sizes_with_common_axes():
    sizes = (30, 50, 20)
    source = [normal(n, 2) for n in sizes]
    figure = plot_map(source, source, [normal(n + 1, 2) for n in sizes], conditions=("a", "b", "c"))
    parts = panels(figure)
    assert len(parts) == 3
    assert len({axes.get_xlim() for axes in parts}) == 1
    assert [part._suptitle.get_text() for part in figure.subfigs if part.axes] == ["a", "b", "c"]
    many = plot_map(*(np.stack([x] * 12) for x in SETS["plane"]))
    assert len(panels(many)) == 9
    assert many._suptitle.get_text() == "9 of 12 conditions"


@pytest.mark.parametrize(
    ("sets", "options", "message"),
    [
        ((X, X[:-1], Y), {}, r"mapped has shape \(59, 2\) but source \(60, 2\)"),
        ((X, X, Y[:, :1]), {}, "target has 1 features, but source 2"),
        ((X, X, np.where(Y > 0, Y, np.nan)), {}, "target holds NaN or infinity"),
        ((X[0], X[0], Y), {}, r"source must have shape \(n, d\), or \(K, n, d\)"),
        ((X[None], X[None], Y), {}, "they must agree"),
        ((X, X, Y), {"conditions": ("a",)}, "conditions has 1 names for no conditions"),
        ((X, X, Y), {"space": "sphere"}, "space='sphere' needs unit vectors of 3, got 2 features"),
        ((X, X, Y), {"space": "torus"}, "space must be one of auto, line"),
        ((X, X, Y), {"theme": "blue"}, "theme must be one of light, dark"),
        ((X, X, Y), {"arrows": -1}, "arrows must be at least 0, got -1"),
        ((X, X, Y), {"feature_names": ("a",)}, "feature_names has 1 names for 2 features"),
        (SETS["components"], {"basis": X}, "basis has 2 features, but the samples have 5"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused(sets, options, message):
    with pytest.raises(ValueError, match=message):
        plot_map(*sets, **options)
