"""An epsilon is a number, or a share that becomes one in one place."""

import pytest
import torch

from lightning_gap import costs
from lightning_gap.monge import optimal_transport
from lightning_gap.monge.ot.epsilon import Epsilon, Weighted, cost_scale, mean_scale
from lightning_gap.monge.ot.options import SolverOptions

# Compiles C++ on first use.
FUSED = pytest.param("fused", marks=pytest.mark.compiler)

X = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = X.flip(0) * 0.5 + 1
COST = costs.SqEuclidean()


@pytest.mark.parametrize("of", ["mean", "std", "typical"])
@pytest.mark.parametrize("solver", ["dense", "blocked", FUSED])
@pytest.mark.parametrize("weighted", [False, True])
def test_solvers_take_the_epsilon_that_it_resolves_to(weighted, solver, of):
    a = torch.arange(40.0, dtype=torch.float64) if weighted else None
    weights = (None if a is None else a / a.sum(), None)
    expected = Epsilon(share=0.1, of=of).resolve(COST, (Weighted(X, weights[0]), Weighted(Y)))
    result = optimal_transport(X, Y, relative_epsilon=0.1, relative_to=of, weights=weights, solver=solver)
    assert result.epsilon == pytest.approx(expected, rel=1e-12)
    assert Epsilon(0.3, of=of).resolve(COST) == 0.3


def test_of_several_pairs_it_is_the_mean():
    pairs = [(Weighted(X), Weighted(Y)), (Weighted(X), Weighted(3 * Y))]
    scales = [cost_scale(COST, X, y) for y in (Y, 3 * Y)]
    assert mean_scale(COST, pairs) == pytest.approx(sum(scales) / 2)
    assert Epsilon(share=0.1).resolve(COST, *pairs) == pytest.approx(0.1 * sum(scales) / 2)


def test_neither_outliers_nor_samples_of_weight_0_move_it():
    y = Y.clone()
    y[0] = 1e6
    clean, dirty = (cost_scale(COST, X, points, of="typical") for points in (Y, y))
    assert dirty == pytest.approx(clean, rel=0.1)
    kept = torch.ones(40, dtype=torch.float64)
    kept[0] = 0
    for of in ("mean", "std", "typical"):
        expected = cost_scale(COST, X, Y[1:], of=of)
        assert cost_scale(COST, X, y, (None, kept), of) == pytest.approx(expected, rel=1e-12)


def test_where_most_samples_coincide_the_mean_is_typical():
    x = torch.zeros(20, 1)
    x[0] = 1
    assert cost_scale(COST, x, x, of="typical") == cost_scale(COST, x, x)


def test_no_share_of_nothing():
    with pytest.raises(ValueError, match=r"the mean sqeuclidean cost is 0\.0, so no share of it can be epsilon"):
        Epsilon().resolve(COST, (Weighted(X[:1]), Weighted(X[:1])))


def test_exact_transport_has_none():
    assert Epsilon.given(SolverOptions("exact"), None, None).absolute == 0
    with pytest.raises(ValueError, match="takes neither epsilon nor rho"):
        Epsilon.given(SolverOptions("exact"), None, 0.1, rho=1.0)
