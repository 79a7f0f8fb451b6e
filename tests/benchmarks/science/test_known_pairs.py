"""The maps that benchmarks take for the truth are optimal."""

import pytest
import torch

from benchmarks.science.known_costs import figures, pair_of, same_run
from benchmarks.science.known_pairs import displaced, rays
from lightning_gap import monge_gap

COSTS = ["pnorm(p=1.5)", "pnorm(p=3)", "sqpnorm(p=1.5)", "elastic(lam=0.5)", "sqeuclidean"]


def make(cost, dim, **options):
    return rays(dim, 256, **options) if cost == "euclidean" else displaced(dim, cost, 256, **options)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dim", [2, 64])
@pytest.mark.parametrize("cost", ["euclidean", *COSTS])
def test_no_rearrangement_of_the_images_costs_less(cost, dim, reverse):
    pair = make(cost, dim, seed=dim, test=300, reverse=reverse)
    x, y = pair.x.double(), pair.true.double()
    assert float(monge_gap(x, y, cost=pair.cost, solver="exact")) <= 1e-5 * float(pair.cost.paired(x, y).mean())
    # Other pairings of the same points do cost more: the gap is no empty check.
    assert float(monge_gap(x, y.roll(1, 0), cost=pair.cost, solver="exact")) > 0.01


@pytest.mark.parametrize("cost", ["euclidean", "pnorm(p=1.5)"])
def test_target_and_images_are_of_one_measure_and_drawn_apart(cost):
    pair = make(cost, 3, seed=1, test=256)
    assert torch.cdist(pair.target, pair.true).min() > 0
    scale = pair.target.std(0)
    assert float(((pair.target.mean(0) - pair.true.mean(0)) / scale).abs().max()) < 0.5


@pytest.mark.parametrize("cost", ["euclidean", "pnorm(p=1.5)"])
def test_a_pair_is_told_by_its_seed(cost):
    first, again, other = (make(cost, 4, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.source, again.source)
    assert torch.equal(first.true, again.true)
    assert not torch.equal(first.source, other.source)


def test_points_keep_their_order_on_a_ray():
    pair = rays(2, 64, seed=0, test=4096)
    moved = (pair.true - pair.x).double()
    # Points nearly on one line through the same center: those further out stay further out.
    direction = torch.nn.functional.normalize(moved, dim=1)
    near = (direction @ direction[0] > 1 - 1e-5) & (torch.linalg.vector_norm(pair.x - pair.x[0], dim=1) < 1)
    along_x, along_y = (points[near].double() @ direction[0] for points in (pair.x, pair.true))
    offset = (pair.x[near] - pair.x[0]).double() - ((pair.x[near] - pair.x[0]).double() @ direction[0])[
        :, None
    ] * direction[0]
    same = offset.norm(dim=1) < 1e-2
    order = along_x[same].argsort()
    assert bool((along_y[same][order].diff() > -1e-2).all())


def test_the_truth_has_no_error_and_no_gap():
    pair = pair_of("pnorm(p=1.5)", 2, 0, 128)
    found = figures(pair, pair.true, rows=200)
    assert found["uvp"] == 0
    assert found["gap"] == pytest.approx(0, abs=1e-6)
    assert found["cosine"] == pytest.approx(1)


def test_a_cost_that_is_no_function_of_differences_is_refused():
    with pytest.raises(ValueError, match=r"h\(x - y\)"):
        displaced(2, "cosine")


def test_rows_of_one_run_are_told_by_pair_map_and_seed():
    row = {"cost": "euclidean", "D": 2, "map": "plan", "seed": 0, "budget": 120.0}
    assert same_run(row, row | {"uvp": 3.0})
    assert not same_run(row, row | {"seed": 1})
