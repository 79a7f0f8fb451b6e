"""Passes over all pairs of samples, and the same sums over the matrix in double."""

import torch

from lightning_gap.monge.ot.solvers.fused.passes import Passes

COSTS = [
    "sqeuclidean",
    "euclidean",
    "pnorm(p=1)",
    "pnorm(p=1.5)",
    "pnorm(p=2)",
    "pnorm(p=3.7)",
    "sqpnorm(p=1.3)",
    "elastic(lam=0.5)",
    "cosine",
    "geodesic",
    "mahalanobis(factor=((1.0, 0.5, 0.0), (0.0, 0.3, -0.7)))",
]
# What potentials, sums and gradients may differ by; a gradient in float32 also by the rounding of its samples.
CLOSE = {torch.float32: 3e-5, torch.float64: 1e-11}


def samples(n, m, d, dtype, *, sphere=False, shift=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    y = 0.8 * torch.randn(m, d, dtype=torch.float64, generator=generator) + 0.3
    if sphere:
        x, y = (points / points.norm(dim=1, keepdim=True) for points in (x, y))
    a, b = (torch.rand(k, dtype=torch.float64, generator=generator) + 0.1 for k in (n, m))
    G = torch.randn(m, dtype=torch.float64, generator=generator)
    return (x + shift).to(dtype), (y + shift).to(dtype), a / a.sum(), b / b.sum(), G


def twin(x, y, a, b, G, cost, epsilon):
    """Soft minima, columns' sums, gradients and masses, from the matrix in double."""
    x, y = x.double().requires_grad_(), y.double()
    C = cost.pairwise(x, y)
    F = -torch.logsumexp(b.log() + G - C.detach() / epsilon, 1)
    shares = torch.exp(F[:, None] + G - C.detach() / epsilon)
    P = a[:, None] * shares * b
    (gradients,) = torch.autograd.grad((P * C).sum(), x)
    return F, (a[:, None] * shares).sum(0), gradients, P.sum(1)


def check(x, y, a, b, G, cost, share=0.05, close=None, passes=Passes):
    epsilon = share * cost.mean(x, y)
    size = float(cost.pairwise(x.double(), y.double()).max())
    passes = passes(x, y, cost, epsilon, size)
    F, columns = passes.soft_minimum(G, b, weights=a)
    alone, none = passes.soft_minimum(G, b)
    gradients, masses = passes.pulls(F, a, G, b)
    expected = twin(x, y, a, b, G, cost, epsilon)
    close = close or CLOSE[x.dtype]
    assert none is None
    assert torch.equal(F, alone)  # a group's height changes no sum of a row
    torch.testing.assert_close(F, expected[0], rtol=close, atol=10 * close)
    torch.testing.assert_close(columns, expected[1], rtol=10 * close, atol=1e-30)
    off = (gradients.double() - expected[2]).norm() / expected[2].norm().clamp_min(1e-30)
    assert float(off) <= 10 * close
    torch.testing.assert_close(masses, expected[3], rtol=10 * close, atol=1e-30)
    return passes
