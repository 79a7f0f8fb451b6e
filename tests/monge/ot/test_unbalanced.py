"""Weights by unbalanced transport."""

import pytest
import torch
from torch import Tensor

from lightning_gap.monge import optimal_transport, unbalanced_weights


def pair(n: int = 20, m: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return x, 2 * torch.randn(m, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("rho", [0.5, 5.0])
def test_unbalanced_weights_are_the_marginals_of_the_plan(rho):
    x, y = pair()
    a, b = unbalanced_weights(x, y, rho=rho, epsilon=0.2)
    plan = optimal_transport(x, y, reach=rho, epsilon=0.2, tolerance=1e-6).plan()
    torch.testing.assert_close(a, plan.sum(1) / plan.sum(), rtol=0.05, atol=1e-4)
    torch.testing.assert_close(b, plan.sum(0) / plan.sum(), rtol=0.05, atol=1e-4)


def test_outliers_count_for_nothing():
    x, y = pair(40, 40)
    x[:4] += 50
    a, _ = unbalanced_weights(x, y, rho=5.0)
    assert a[:4].sum() < 1e-6
    assert a.sum() == pytest.approx(1)


def test_a_large_rho_weighs_all_alike():
    x, y = pair()
    a, _ = unbalanced_weights(x, y, rho=1e6, epsilon=0.5)
    torch.testing.assert_close(a, torch.full_like(a, 1 / len(x)), rtol=0.05, atol=0)


def test_a_rho_that_leaves_nothing_is_told():
    x, y = pair()
    with pytest.raises(FloatingPointError, match="raise it to the scale of the costs"):
        unbalanced_weights(x.float(), y.float() + 1e4, rho=1e-3, epsilon=10.0)


def test_the_old_name_of_rho_is_taken():
    x, y = pair()
    with pytest.warns(DeprecationWarning, match="reach is called rho now"):
        old = unbalanced_weights(x, y, reach=5.0)
    assert torch.equal(old[0], unbalanced_weights(x, y, rho=5.0)[0])
    with pytest.raises(TypeError, match="needs rho"):
        unbalanced_weights(x, y)
