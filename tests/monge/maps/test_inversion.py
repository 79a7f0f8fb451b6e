"""Preimages under maps without a closed inverse, and points on the way to images."""

import math

import pytest
import torch
from test_maps import arguments, every_map, learned, normal
from torch import nn

from lightning_gap.monge import BrenierMap, ResidualMLP, SphereMap, StructuredMap
from lightning_gap.monge.maps.displacement import displaced
from lightning_gap.monge.maps.inversion import affine_guess, preimages


def fitted(net, f, d, steps=150):
    """A map that has learned a function of Gaussian samples."""
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(128, d, generator=generator)
        loss = (net(x) - f(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d", [1, 2, 8, 150])
def test_an_affine_map_is_inverted_as_by_its_matrix(d, dtype):
    A = torch.eye(d, dtype=dtype) + normal(d, d).to(dtype) / (3 * d**0.5)
    x = normal(40, d, seed=1).to(dtype)
    found = preimages(lambda z, rows: z @ A.mT + 5, x @ A.mT + 5)
    assert found.converged.all()
    torch.testing.assert_close(found.points, x, rtol=1e-3, atol=1e-3 if dtype == torch.float32 else 1e-5)


@pytest.mark.parametrize("d", [1, 3, 130])
def test_a_map_of_each_feature_is_inverted_to_the_last_digits(d):
    y = 3 * normal(50, d).double()
    found = preimages(lambda z, rows: z + z**3 / 3 + 2, y + 2, tolerance=1e-10)
    assert found.converged.all()
    torch.testing.assert_close(found.points + found.points**3 / 3, y, rtol=0, atol=1e-8)
    assert (found.residuals <= 1e-10 * found.sizes).all()


@every_map
def test_each_map_s_images_have_preimages(kind):
    net = learned(kind, 3).double()
    x, *condition = (part.double() if part.is_floating_point() else part for part in arguments(net, 30))
    with torch.no_grad():
        y = net(x, *condition)
    on_sphere = isinstance(net, SphereMap)
    found = preimages(lambda z, rows: net(z, *(c[rows] for c in condition)), y, [x + 0.05], on_sphere=on_sphere)
    assert found.points.isfinite().all()
    # Random weights make maps that fold, to which there may be no way from outside.
    assert found.converged.float().mean() > 0.9
    with torch.no_grad():
        images = net(found.points, *condition)
    torch.testing.assert_close((images - y).norm(dim=1), found.residuals, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "share"),
    [
        (lambda: ResidualMLP(3, (32,)), 0.98),
        # Where the slope of the conjugate is flat or steep, a free field may fold.
        (lambda: StructuredMap(3, "pnorm(p=1.5)", (32,)), 0.8),
        (lambda: StructuredMap(3, "elastic(lam=0.3)", (32,), potential=True), 0.8),
        (lambda: BrenierMap(3, (16, 16), start="identity"), 0.98),
    ],
    ids=["residual", "pnorm", "elastic", "brenier"],
)
def test_a_learned_map_is_undone(make, share):
    torch.manual_seed(0)
    net = fitted(make(), lambda x: 2 * x + torch.tanh(x) + 3, 3).double()
    x = normal(200, 3, seed=5).double()
    with torch.no_grad():
        found = preimages(lambda z, rows: net(z), net(x))
    assert found.converged.all()
    assert ((found.points - x).norm(dim=1) < 1e-4).float().mean() > share
    assert (found.orientations == 1).float().mean() > share


def test_the_sphere_is_not_left():
    torch.manual_seed(0)
    net = SphereMap(3, (16,)).double()
    nn.init.normal_(net.displacement[-1].weight, std=0.1)
    x = nn.functional.normalize(normal(100, 3).double(), dim=1)
    with torch.no_grad():
        found = preimages(lambda z, rows: net(z), net(x), on_sphere=True)
    assert found.converged.all()
    torch.testing.assert_close(found.points.norm(dim=1), torch.ones(100).double())
    torch.testing.assert_close(found.points, x, rtol=0, atol=1e-4)


def test_what_has_no_preimage_gets_the_nearest_point_and_is_told():
    y = torch.linspace(-2, 2, 9).double()[:, None]
    found = preimages(lambda z, rows: z**2, y)
    assert found.converged.tolist() == [*[False] * 4, *[True] * 5]
    assert found.points.isfinite().all()
    torch.testing.assert_close(found.residuals[:4], -y[:4, 0], rtol=1e-3, atol=1e-3)


def test_values_that_are_not_finite_fail_without_spoiling_others():
    y = torch.tensor([[4.0], [9.0], [-1.0]]).double()
    found = preimages(lambda z, rows: z.sqrt() * 2, y)  # NaN below zero
    assert found.converged.tolist() == [True, True, False]
    torch.testing.assert_close(found.points[:2, 0], torch.tensor([4.0, 20.25]).double(), rtol=0, atol=1e-4)
    assert found.points.isfinite().all()


def test_a_fold_shows_in_the_orientations():
    x = torch.tensor([[-2.0], [0.1], [2.0]]).double()
    found = preimages(lambda z, rows: z**3 - z, x**3 - x, [x + 0.01])
    assert found.orientations.tolist() == [1, -1, 1]


def test_samples_that_fail_start_again_from_the_preimages_of_others():
    # From the samples themselves every step leads nowhere: the function is flat there.
    def flat_beyond(z, rows):
        return torch.where(z.abs() < 3, z + 10, 100 + 0 * z)

    y = torch.linspace(8, 12, 41).double()[:, None]
    alone = preimages(flat_beyond, y)
    assert not alone.converged.any()
    start = y.clone()
    start[20] = 0.5
    assert preimages(flat_beyond, y, [start]).converged.all()


def test_no_samples_and_inference_mode():
    with torch.inference_mode():
        assert preimages(lambda z, rows: 2 * z, torch.zeros(0, 3)).points.shape == (0, 3)
        found = preimages(lambda z, rows: 2 * z, torch.ones(2, 3))
    torch.testing.assert_close(found.points, torch.full((2, 3), 0.5))


def test_a_map_without_gradient_is_refused():
    with pytest.raises(ValueError, match="no gradient in its samples"):
        preimages(lambda z, rows: (2 * z).detach(), torch.ones(2, 3))


@pytest.mark.parametrize(
    "net",
    [
        ResidualMLP(2, (4,), start="gaussian"),
        ResidualMLP(2, (4,), start="mean"),
        StructuredMap(2, "pnorm(p=3)", (4,), start="mean"),
    ],
    ids=["gaussian", "mean", "structured"],
)
def test_the_affine_term_is_a_good_guess(net):
    x = normal(100, 2)
    net.start(x, 3 * normal(100, 2, seed=1) + 1)
    with torch.no_grad():
        torch.testing.assert_close(affine_guess(net, net(x)), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("net", [ResidualMLP(2), BrenierMap(2), nn.Linear(2, 2)], ids=["identity", "convex", "own"])
def test_other_maps_have_no_affine_term(net):
    assert affine_guess(net, torch.zeros(3, 2)) is None


# --- part of the way ---


def test_the_straight_way_is_a_mean():
    x, y = normal(10, 3), normal(10, 3, seed=1)
    assert torch.equal(displaced(x, y, 0), x)
    assert torch.equal(displaced(x, y, 1), y)
    torch.testing.assert_close(displaced(x, y, 0.25), 0.75 * x + 0.25 * y)


@pytest.mark.parametrize("t", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("angle", [0, 1e-9, 1e-4, 0.3, 2, 3.1, math.pi])
def test_the_way_on_the_sphere_has_constant_speed(angle, t):
    x = torch.tensor([[0.0, 0.6, 0.8]], dtype=torch.float64)
    across = torch.tensor([[1.0, 0.0, 0.0]]).double()
    y = math.cos(angle) * x + math.sin(angle) * across
    point = displaced(x, y, t, on_sphere=True)
    torch.testing.assert_close(point.norm(dim=1), torch.ones(1).double())
    if angle < math.pi:
        torch.testing.assert_close(point, math.cos(t * angle) * x + math.sin(t * angle) * across, rtol=0, atol=1e-9)
    else:  # one of many ways
        torch.testing.assert_close((point * x).sum(1), torch.tensor([math.cos(t * angle)]).double())


@pytest.mark.parametrize("angle", [0.0, 1e-9, 0.5])
def test_the_way_on_the_sphere_is_differentiable(angle):
    x = torch.tensor([[1.0, 0.0, 0.0]]).double().requires_grad_()
    y = torch.tensor([[math.cos(angle), math.sin(angle), 0.0]]).double().requires_grad_()
    displaced(x, y, 0.25, on_sphere=True)[:, 2].sum().backward()
    weights = (
        (0.75, 0.25)
        if angle < 1e-6
        else (math.sin(0.75 * angle) / math.sin(angle), math.sin(0.25 * angle) / math.sin(angle))
    )
    for part, weight in zip((x, y), weights, strict=True):
        torch.testing.assert_close(part.grad[0, 2], torch.tensor(weight).double())
