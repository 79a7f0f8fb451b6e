"""The objective of a map: conditions, weights, reference samples, unbalanced transport."""

from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_gap import costs, monge_gap, sinkhorn_divergence
from lightning_gap.monge import energy_distance
from lightning_gap.monge.objective import MapObjective, unbalanced_weights
from lightning_gap.monge.ot.solve import optimal_transport

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
    loss, gap = objective()(x, mapped, y, **EPSILONS)
    torch.testing.assert_close(loss, sinkhorn_divergence(mapped, y, epsilon=0.5))
    torch.testing.assert_close(gap, monge_gap(x, mapped, epsilon=0.1))


def test_without_the_gap_there_is_none():
    assert objective()(*triple(), **EPSILONS, with_gap=False)[1] is None


@pytest.mark.parametrize("fitting_loss", ["sinkhorn", "energy"])
def test_conditions_are_averaged(fitting_loss):
    each = [triple(seed=k) for k in range(3)]
    terms = [objective(fitting_loss)(*one, **EPSILONS) for one in each]
    loss, gap = objective(fitting_loss)(*(torch.stack(parts) for parts in zip(*each, strict=True)), **EPSILONS)
    torch.testing.assert_close(loss, torch.stack([term[0] for term in terms]).mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gap, torch.stack([term[1] for term in terms]).mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("fitting_loss", ["sinkhorn", "energy"])
def test_a_weight_of_two_is_the_sample_twice(fitting_loss):
    x, mapped, y = triple()
    doubled = [torch.cat([part, part[:5]]) for part in (x, mapped)]
    weights = torch.ones(len(x), dtype=x.dtype)
    weights[:5] = 2
    exact = {"solver": "dense"}
    once = objective(fitting_loss, **exact)(*doubled, y, **EPSILONS)
    twice = objective(fitting_loss, **exact)(x, mapped, y, **EPSILONS, weights=(weights, None))
    torch.testing.assert_close(twice[0], once[0], rtol=1e-3, atol=1e-4)
    # The entropies of 20 and of 25 atoms differ, gaps do not but for them.
    shift = 0.1 * (torch.special.entr(weights / 25).sum() - torch.log(torch.tensor(25.0)))
    torch.testing.assert_close(twice[1] - 2 * shift, once[1], rtol=2e-3, atol=2e-3)


def test_a_function_of_ones_own_is_the_fitting_loss():
    x, mapped, y = triple()

    def means(mapped, target, weights=None):
        assert weights is None
        return (mapped.mean(0) - target.mean(0)).square().sum()

    loss, _ = objective(means)(x, mapped, y, **EPSILONS)
    assert loss == means(mapped, y)


def test_the_gap_of_a_reference_is_that_of_its_samples():
    x, mapped, y = triple()
    reference = triple(seed=4)[:2]
    _, gap = objective(gap_on="reference")(x, mapped, y, **EPSILONS, reference=reference)
    torch.testing.assert_close(gap, monge_gap(*reference, epsilon=0.1))
    _, both = objective(gap_on="both")(x, mapped, y, **EPSILONS, reference=reference)
    together = [torch.cat(parts) for parts in zip((x, mapped), reference, strict=True)]
    torch.testing.assert_close(both, monge_gap(*together, epsilon=0.1))


@pytest.mark.parametrize("reach", [0.5, 5.0])
def test_unbalanced_weights_are_the_marginals_of_the_plan(reach):
    x, _, y = triple()
    a, b = unbalanced_weights(x, y, reach=reach, epsilon=0.2)
    plan = optimal_transport(x, y, reach=reach, epsilon=0.2, tolerance=1e-6).plan()
    torch.testing.assert_close(a, plan.sum(1) / plan.sum(), rtol=0.05, atol=1e-4)
    torch.testing.assert_close(b, plan.sum(0) / plan.sum(), rtol=0.05, atol=1e-4)


def test_reweighting_leaves_outliers_aside():
    x, mapped, y = triple(40, 40)
    x[:4] += 50
    a, _ = unbalanced_weights(x, y, reach=5.0)
    assert a[:4].sum() < 1e-6
    assert a.sum() == pytest.approx(1)
    _, gap = objective(reach=5.0, reweight=True)(x, mapped, y, **EPSILONS)
    a, _ = unbalanced_weights(x, y, reach=5.0, epsilon=0.5)
    torch.testing.assert_close(gap, monge_gap(x, mapped, epsilon=0.1, weights=a))


def test_a_large_reach_weighs_all_alike():
    x, _, y = triple()
    a, _ = unbalanced_weights(x, y, reach=1e6, epsilon=0.5)
    torch.testing.assert_close(a, torch.full_like(a, 1 / len(x)), rtol=0.05, atol=0)


def test_a_reach_that_leaves_nothing_is_told():
    x, _, y = triple()
    with pytest.raises(FloatingPointError, match="raise it to the scale of the costs"):
        unbalanced_weights(x.float(), y.float() + 1e4, reach=1e-3, epsilon=10.0)


def test_weighted_energy_is_that_of_repeated_samples():
    x, _, y = triple()
    weights = torch.ones(len(x), dtype=x.dtype)
    weights[:5] = 2
    doubled = torch.cat([x, x[:5]])
    torch.testing.assert_close(
        energy_distance(x, y, weights=(weights / weights.sum(), None)), energy_distance(doubled, y)
    )
