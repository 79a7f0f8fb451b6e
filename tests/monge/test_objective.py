"""The objective of a map: conditions, weights, reference samples, reweighting."""

from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_gap import costs, monge_gap, sinkhorn_divergence
from lightning_gap.monge import energy_distance, unbalanced_weights
from lightning_gap.monge.objective import MapObjective
from lightning_gap.monge.ot.options import SolverOptions

EPSILONS = {"fitting_epsilon": 0.5, "gap_epsilon": 0.1}
SQ = costs.SqEuclidean()
objective = partial(MapObjective, SQ, SQ)


def triple(n: int = 20, m: int = 24, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    mapped = x.flip(-1) + 1
    return x, mapped, 2 * torch.randn(m, 2, generator=generator, dtype=torch.float64)


def test_it_is_the_divergence_and_the_gap():
    x, mapped, y = triple()
    loss, gap, *_ = objective().terms(x, mapped, y, **EPSILONS)
    torch.testing.assert_close(loss, sinkhorn_divergence(mapped, y, epsilon=0.5))
    torch.testing.assert_close(gap, monge_gap(x, mapped, epsilon=0.1))


def test_without_the_gap_there_is_none():
    assert objective().terms(*triple(), **EPSILONS, with_gap=False)[1] is None


@pytest.mark.parametrize("fitting_loss", ["sinkhorn", "energy"])
def test_conditions_are_averaged(fitting_loss):
    each = [triple(seed=k) for k in range(3)]
    terms = [objective(fitting_loss).terms(*one, **EPSILONS) for one in each]
    loss, gap, *_ = objective(fitting_loss).terms(
        *(torch.stack(parts) for parts in zip(*each, strict=True)), **EPSILONS
    )
    torch.testing.assert_close(loss, torch.stack([term[0] for term in terms]).mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gap, torch.stack([term[1] for term in terms]).mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("fitting_loss", ["sinkhorn", "energy"])
def test_a_weight_of_two_is_the_sample_twice(fitting_loss):
    x, mapped, y = triple()
    doubled = [torch.cat([part, part[:5]]) for part in (x, mapped)]
    weights = torch.ones(len(x), dtype=x.dtype)
    weights[:5] = 2
    exact = {"options": SolverOptions("dense")}
    once = objective(fitting_loss, **exact).terms(*doubled, y, **EPSILONS)
    twice = objective(fitting_loss, **exact).terms(x, mapped, y, **EPSILONS, weights=(weights, None))
    torch.testing.assert_close(twice[0], once[0], rtol=1e-3, atol=1e-4)
    # The entropies of 20 and of 25 atoms differ, gaps do not but for them.
    shift = 0.1 * (torch.special.entr(weights / 25).sum() - torch.log(torch.tensor(25.0)))
    torch.testing.assert_close(twice[1] - 2 * shift, once[1], rtol=2e-3, atol=2e-3)


def test_a_function_of_ones_own_is_the_fitting_loss():
    x, mapped, y = triple()

    def means(mapped, target, weights=None):
        assert weights is None
        return (mapped.mean(0) - target.mean(0)).square().sum()

    loss, *_ = objective(means).terms(x, mapped, y, **EPSILONS)
    assert loss == means(mapped, y)


def test_the_gap_of_a_reference_is_that_of_its_samples():
    x, mapped, y = triple()
    reference = triple(seed=4)[:2]
    _, gap, *_ = objective(gap_on="reference").terms(x, mapped, y, **EPSILONS, reference=reference)
    torch.testing.assert_close(gap, monge_gap(*reference, epsilon=0.1))
    _, both, *_ = objective(gap_on="both").terms(x, mapped, y, **EPSILONS, reference=reference)
    together = [torch.cat(parts) for parts in zip((x, mapped), reference, strict=True)]
    torch.testing.assert_close(both, monge_gap(*together, epsilon=0.1))


def test_reweighting_leaves_outliers_aside():
    x, mapped, y = triple(40, 40)
    x[:4] += 50
    _, gap, *_ = objective(rho=5.0, reweight=True).terms(x, mapped, y, **EPSILONS)
    a, _ = unbalanced_weights(x, y, rho=5.0, epsilon=0.5)
    torch.testing.assert_close(gap, monge_gap(x, mapped, epsilon=0.1, weights=a))


def test_weighted_energy_is_that_of_repeated_samples():
    x, _, y = triple()
    weights = torch.ones(len(x), dtype=x.dtype)
    weights[:5] = 2
    doubled = torch.cat([x, x[:5]])
    torch.testing.assert_close(
        energy_distance(x, y, weights=(weights / weights.sum(), None)), energy_distance(doubled, y)
    )
