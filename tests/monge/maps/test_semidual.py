"""The semi-dual: least at the true potential, unbiased over batches, and its gradient by the envelope theorem."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_gap.monge import BrenierMap
from lightning_gap.monge.maps.semidual import HeldOutSamples, difference, mean_semidual, semidual, semidual_values


class Quadratic(NamedTuple):
    """The potential x A x / 2 + b x, whose gradient is A x + b."""

    matrix: Tensor
    shift: Tensor
    target_scale: float = 1.0

    def __call__(self, x):
        return x @ self.matrix + self.shift

    def potential(self, x):
        return ((x @ self.matrix) * x).sum(-1) / 2 + x @ self.shift

    @property
    def center(self):
        return torch.zeros_like(self.shift)

    image_center = center

    centred_potential = potential

    def hessian(self, x):
        return self.matrix.expand(len(x), -1, -1)

    def inverse(self, y, *, start=None, tolerance=1e-5):
        return torch.linalg.solve(self.matrix, (y - self.shift).mT).mT


def draws(n: int, dim: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(dim: int = 3, seed: int = 1) -> Tensor:
    root = draws(dim, dim, seed)
    return root @ root.mT / dim + 0.5 * torch.eye(dim, dtype=torch.float64)


def brenier(x: Tensor, y: Tensor) -> BrenierMap:
    torch.manual_seed(0)
    net = BrenierMap(x.shape[1], (8, 8), start="gaussian").double()
    net.start(x, y)
    return net


@pytest.mark.parametrize("seed", range(3))
def test_at_the_true_potential_it_is_the_mean_of_products(seed):
    net, x = Quadratic(positive(seed=seed + 1), draws(1, seed=9)[0]), draws(50, seed=seed)
    y = net(x)
    assert float(semidual(net, x, y)) == pytest.approx(float((x * y).sum(-1).mean()), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_least_there(seed):
    A, b, x = positive(seed=seed + 1), draws(1, seed=9)[0], draws(200, seed=seed)
    y = Quadratic(A, b)(x)
    least = float(semidual(Quadratic(A, b), x, y))
    for k in range(5):
        off = 0.1 * positive(seed=20 + k)
        assert float(semidual(Quadratic(A + off, b), x, y)) > least
        assert float(semidual(Quadratic(A, b + 0.3 * draws(1, seed=30 + k)[0]), x, y)) > least


def test_batches_are_unbiased_and_weights_count_as_repetitions():
    net, x, y = Quadratic(positive(), draws(1)[0]), draws(40), 2 * draws(40, seed=2)
    parts = [float(semidual(net, x[k : k + 10], y[k : k + 10])) for k in range(0, 40, 10)]
    assert sum(parts) / 4 == pytest.approx(float(semidual(net, x, y)), rel=1e-9)
    weights = torch.arange(40, dtype=torch.float64) % 3
    repeated = x.repeat_interleave(weights.long(), 0), y.repeat_interleave(weights.long(), 0)
    shares = weights / weights.sum()
    assert float(semidual(net, x, y, weights=(shares, shares))) == pytest.approx(float(semidual(net, *repeated)))


def test_its_gradient_is_that_of_finite_differences():
    x = draws(60, 2)
    y = x @ positive(2) + 1
    net = brenier(x, y)
    loss = semidual(net, x, y)
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        values = []
        for step in (1e-3, -1e-3):
            with torch.no_grad():
                parameter += step * direction
                found = semidual_values(net, x, y)
                values.append(float(found.potential.mean() + found.conjugate.mean()))
                parameter -= step * direction
        expected = (values[0] - values[1]) / 2e-3
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=2e-2, abs=2e-3)


def test_a_difference_is_zero_of_the_same_and_the_other_way_round_otherwise():
    x, y = draws(50), draws(50, seed=4)
    held = HeldOutSamples(x, y)
    ours, theirs = (semidual_values(Quadratic(a * torch.eye(3).double(), x[0]), x, y) for a in (1.0, 2.0))
    assert difference(ours, ours, held) == (0.0, 0.0)
    gain, error = difference(theirs, ours, held)
    assert gain == pytest.approx(mean_semidual(theirs, held) - mean_semidual(ours, held))
    assert (-gain, error) == pytest.approx(difference(ours, theirs, held))
    assert error > 0
