"""The energy distance between distributions of batches: its definition, and that its gradient has no bias."""

import pytest
import torch

from lightning_gap.monge import minibatch_energy_distance, optimal_transport, sinkhorn_divergence


def test_it_is_the_sum_that_is_promised():
    x, y = torch.randn(14, 3, dtype=torch.float64), 1 + torch.randn(11, 3, dtype=torch.float64)
    halves = (x[:7], x[7:]), (y[:6], y[6:])

    def cost(a, b):
        return optimal_transport(a, b, cost="euclidean", epsilon=1.0, tolerance=1e-6).value

    across = sum(cost(a, b) for a in halves[0] for b in halves[1])
    expected = across / 4 - (cost(*halves[0]) + cost(*halves[1])) / 2
    found = minibatch_energy_distance(x, y, cost="euclidean", epsilon=1.0, tolerance=1e-6)
    torch.testing.assert_close(found, expected)


def test_its_gradient_has_no_bias_where_a_divergences_has():
    generator = torch.Generator().manual_seed(0)

    def slopes(divergence):
        # Of the divergence between s X and Y at s = 1, where both have one distribution.
        found = []
        for _ in range(400):
            x, y = (torch.randn(12, 1, generator=generator, dtype=torch.float64) for _ in range(2))
            s = torch.ones((), dtype=torch.float64, requires_grad=True)
            found.append(torch.autograd.grad(divergence(s * x, y, solver="exact"), s)[0])
        found = torch.stack(found)
        return float(found.mean()), float(found.std() / len(found) ** 0.5)

    mean, error = slopes(minibatch_energy_distance)
    assert abs(mean) < 4 * error
    mean, error = slopes(sinkhorn_divergence)
    assert mean > 8 * error


def test_one_sample_has_no_halves():
    with pytest.raises(ValueError, match="y must hold at least 2"):
        minibatch_energy_distance(torch.zeros(4, 1), torch.zeros(1, 1))
