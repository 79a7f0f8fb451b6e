"""Images of an entropic plan: right for the cost, beyond the samples, and in blocks as in one piece."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_gap import costs
from lightning_gap.monge import optimal_transport
from lightning_gap.monge.maps.plan_images import half_plan, has_gradient_map, plan_images, strictly_convex
from lightning_gap.monge.ot.costs import Cost, resolve
from lightning_gap.monge.ot.limits import LIMITS, Size


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solved(cost: Cost, *, sphere: bool = False, weights: tuple[Tensor | None, Tensor | None] = (None, None)):
    x, y = normal(40, 3), 0.5 * normal(30, 3, seed=1) + 1
    if sphere:
        x, y = normalize(x, dim=-1), normalize(y, dim=-1)
    return x, optimal_transport(x, y, cost=cost, relative_epsilon=0.05, tolerance=1e-9, weights=weights)


@pytest.mark.parametrize("name", ["sqeuclidean", "euclidean", "cosine", "mahalanobis"])
def test_on_the_samples_means_are_those_of_the_plan(name):
    cost = costs.Mahalanobis([[1.0, 0.5, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]]) if name == "mahalanobis" else name
    x, result = solved(resolve(cost))
    torch.testing.assert_close(plan_images(half_plan(result), x, resolve(cost)), result.barycentric_projection())


@pytest.mark.parametrize("cost", ["pnorm(p=1.5)", "pnorm(p=3)", "sqpnorm(p=1.5)", "elastic(lam=0.3)"])
def test_the_image_is_the_map_of_the_plans_potential(cost):
    cost = resolve(cost)
    _, result = solved(cost)
    plan, points = half_plan(result), normal(5, 3, seed=2).requires_grad_()
    exponents = (plan.potential - cost.pairwise(points, plan.points)) / plan.epsilon + plan.weights.log()
    potential = -plan.epsilon * exponents.logsumexp(1)
    (slope,) = torch.autograd.grad(potential.sum(), points)
    expected = points.detach() - cost.grad_h_conjugate(slope)
    torch.testing.assert_close(plan_images(plan, points.detach(), cost), expected, rtol=1e-4, atol=1e-4)
    mean = (exponents.softmax(1) @ plan.points).detach()
    torch.testing.assert_close(plan_images(plan, points.detach(), cost, "mean"), mean)


def test_on_the_sphere_it_is_the_point_of_the_least_mean_squared_angle():
    cost = resolve("geodesic")
    x, result = solved(cost, sphere=True)
    plan = half_plan(result)
    images = plan_images(plan, x, cost)
    torch.testing.assert_close(images.norm(dim=-1), torch.ones(40, dtype=torch.float64))
    weights = ((plan.potential - cost.pairwise(x, plan.points)) / plan.epsilon).softmax(1)

    def spread(z: Tensor) -> Tensor:
        return (weights * cost.pairwise(z, plan.points).square()).sum(1)

    for seed in range(5):
        near = normalize(images + 1e-2 * normal(40, 3, seed=seed), dim=-1)
        assert bool((spread(near) > spread(images) - 1e-7).all())


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "pnorm(p=1.5)", "geodesic"])
def test_it_has_the_slopes_of_differences(cost):
    cost = resolve(cost)
    x, result = solved(cost, sphere=cost.name == "geodesic")
    plan = half_plan(result)
    points = (x if cost.name == "geodesic" else normal(4, 3, seed=2))[:4].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: plan_images(plan, p, cost), (points,), fast_mode=True, atol=1e-3)


def test_blocks_and_weights_of_zero_do_not_show(monkeypatch):
    b = torch.cat([torch.full((20,), 0.05), torch.zeros(10)]).double()
    for name in ("sqeuclidean", "pnorm(p=1.5)"):
        cost = resolve(name)
        x, result = solved(cost, weights=(None, b))
        assert len(half_plan(result).points) == 20
        whole = plan_images(half_plan(result), x, cost)
        monkeypatch.setattr(LIMITS, "block", Size(64, 64), raising=False)
        monkeypatch.setattr(LIMITS, "cached", Size(64, 64), raising=False)
        torch.testing.assert_close(plan_images(half_plan(result), x, cost), whole)
        monkeypatch.undo()
    assert plan_images(half_plan(result), x[:0], cost).shape == (0, 3)


def test_an_exact_plan_does_not_extend():
    with pytest.raises(ValueError, match="an exact plan has no potentials"):
        half_plan(optimal_transport(normal(5, 2), normal(5, 2, seed=1), solver="exact"))


@pytest.mark.parametrize("cost", ["euclidean", "pnorm(p=1)", "geodesic"])
def test_ties_are_broken_by_a_square_as_it_is_defined(cost):
    cost = resolve(cost)
    x, y = (normalize(normal(n, 3, seed=n), dim=-1) for n in (7, 5))
    summed = strictly_convex(cost, 0.25)
    square = (x[:, None] - y).square().sum(-1) if cost.name == "pnorm" else cost.pairwise(x, y).square()
    expected = cost.pairwise(x, y) + 0.25 * square
    torch.testing.assert_close(summed.pairwise(x, y), expected)
    torch.testing.assert_close(summed.elementwise(x[:, None], y), expected)
    torch.testing.assert_close(summed.geometry.fill(x.new_empty(7, 5), x, y), expected)
    assert str(summed) == f"{cost} + 0.25 times its square"
    assert strictly_convex(cost, 0.0) is cost
    assert strictly_convex(resolve("sqeuclidean"), 0.25) == resolve("sqeuclidean")


def test_along_a_ray_mass_keeps_its_order():
    # On a line every plan to the right costs the same; the order is what the square decides.
    x, y = torch.linspace(0, 1, 30).double()[:, None], torch.linspace(1, 3, 30).double()[:, None]
    for slope, monotone in ((0.3, True), (0.0, False)):
        cost = strictly_convex(costs.Euclidean(), slope)
        plan = half_plan(optimal_transport(x, y, cost=cost, relative_epsilon=0.005))
        images = plan_images(plan, x, costs.Euclidean()).flatten()
        assert bool((images.diff() > 0.02).all()) is monotone


def test_which_costs_have_a_gradient_map():
    names = ["pnorm(p=1.5)", "elastic(lam=1)", "sqeuclidean", "euclidean", "pnorm(p=1)", "cosine", "geodesic"]
    assert [has_gradient_map(resolve(name), 2) for name in names] == [True, True, True, False, False, False, False]
    assert math.isfinite(
        float(plan_images(half_plan(solved(resolve("cosine"))[1]), normal(1, 3), costs.Cosine()).sum())
    )
