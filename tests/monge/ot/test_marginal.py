"""Wasserstein distances feature by feature."""

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from scored_samples import A, B, D, X, Y

from lightning_gap.monge import marginal_wasserstein
from lightning_gap.monge.ot.limits import LIMITS


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("block", [1 << 22, 200])
def test_marginal_distances_are_those_of_scipy(weighted, block, monkeypatch):
    monkeypatch.setattr(LIMITS, "sorted", block)
    x, y = torch.cat([X, X[:5]]).double(), Y.double()  # with ties
    a = torch.cat([A, A[:5]]).double()
    a = a / a.sum()
    weights = (a, B.double()) if weighted else (None, None)
    expected = [
        wasserstein_distance(x[:, k], y[:, k], *(w if w is None else w.numpy() for w in weights)) for k in range(D)
    ]
    np.testing.assert_allclose(marginal_wasserstein(x, y, weights=weights), expected, rtol=1e-6, atol=1e-9)
    assert float(marginal_wasserstein(x, x.flip(0), weights=(None, None)).abs().max()) < 1e-12


def test_marginal_distances_of_one_sample_and_in_half_precision():
    torch.testing.assert_close(
        marginal_wasserstein(torch.zeros(1, 2), torch.tensor([[1.0, -2.0]])), torch.tensor([1.0, 2.0])
    )
    half = marginal_wasserstein(X.bfloat16(), Y.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, marginal_wasserstein(X, Y), rtol=0.05, atol=0.02)


def test_marginal_distances_have_their_gradient():
    x, y = X[:7].double().requires_grad_(), Y[:5].double().requires_grad_()
    assert torch.autograd.gradcheck(marginal_wasserstein, (x, y))


@pytest.mark.parametrize(
    ("args", "weights", "message"),
    [
        ((X, Y[:, :2]), (None, None), "x has dimension 3 but y has 2"),
        ((X, Y), (A * 2, None), r"weights\[0\] must sum to 1, got 2"),
        ((X, Y), (None, A), r"weights\[1\] must have shape \(45,\)"),
    ],
)
def test_marginal_distances_refuse(args, weights, message):
    with pytest.raises(ValueError, match=message):
        marginal_wasserstein(*args, weights=weights)
