"""The energy distance, in blocks as in one piece, and its gradient."""

import pytest
import torch
from scored_samples import A, B, M, T, X, Y

from lightning_gap.monge import energy_distance
from lightning_gap.monge.ot.limits import LIMITS, Size


def distances(x, y):
    """By differences: those that ``torch.cdist`` takes from a Gram matrix vary with the processor."""
    return (x.double()[:, None] - y.double()).norm(dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_energy_distance_is_that_of_all_pairs(dtype, monkeypatch):
    x, y = X.to(dtype), T[:40].to(dtype)
    expected = (2 * distances(x, y).mean() - distances(x, x).mean() - distances(y, y).mean()).to(dtype)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-7, "atol": 1e-7}
    torch.testing.assert_close(energy_distance(x, y), expected, **close)
    monkeypatch.setattr(LIMITS, "block", Size(7 * 40, 0))
    torch.testing.assert_close(energy_distance(x, y), expected, **close)
    assert energy_distance(x, x).abs() < 1e-6


def test_energy_distance_has_its_gradient_in_blocks(monkeypatch):
    monkeypatch.setattr(LIMITS, "block", Size(20, 0))
    x, y = (p[:6].double().requires_grad_() for p in (X, T))
    assert torch.autograd.gradcheck(energy_distance, (x, y))
    assert torch.autograd.gradgradcheck(energy_distance, (x, y))


def test_weighted_energy_distance_is_that_of_all_pairs_and_has_its_gradient(monkeypatch):
    monkeypatch.setattr(LIMITS, "block", Size(7 * M, 0))
    weights = [(w.double() / w.double().sum()) for w in (A, B)]
    samples = [X.double(), Y.double()]

    def by_pairs(x, y, a, b):
        between, within_x, within_y = ((u[:, None] - v).norm(dim=-1) for u, v in ((x, y), (x, x), (y, y)))
        return 2 * a @ between @ b - a @ within_x @ a - b @ within_y @ b

    results = []
    for distance in (lambda x, y, a, b: energy_distance(x, y, weights=(a, b)), by_pairs):
        leaves = [t.clone().requires_grad_() for t in (*samples, *weights)]
        x, y, a, b = leaves
        value = distance(x, y, a / a.sum(), b / b.sum())
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)
