"""Bad input to the Monge gap and the Sinkhorn divergence is answered by name, value and remedy."""

import math

import numpy as np
import pytest
import torch
from geomloss import SamplesLoss

from lightning_gap import costs, monge_gap, sinkhorn_divergence
from lightning_gap.monge import optimal_transport

X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
Y = X.flip(0) + 1
BAD = X.clone()
BAD[2, 0] = math.nan
BAD[5, 1] = math.inf
SPHERE = X / X.norm(dim=1, keepdim=True)
ZERO = X.clone()
ZERO[4] = 0

both = pytest.mark.parametrize(
    ("function", "second"),
    [(monge_gap, "mapped"), (sinkhorn_divergence, "y")],
    ids=["monge_gap", "sinkhorn_divergence"],
)


@both
@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (X[0], Y, ValueError, r"^x must have shape \(n, d\), got \(3,\): add the missing dimension"),
        (X, Y[:, 0], ValueError, r"^{second} must have shape \(n, d\), got \(20,\)"),
        (X[None], Y, ValueError, r"^x must have shape \(n, d\), got \(1, 20, 3\)"),
        (X[:0], Y[:0], ValueError, "^x is empty"),
        (X, Y[:, :2], ValueError, "^x has dimension 3 but {second} has 2"),
        (X.numpy(), Y, TypeError, r"^x must be a tensor, got ndarray: use torch.as_tensor\(x\)"),
        (X, Y.tolist(), TypeError, r"^{second} must be a tensor, got list"),
        (X.int(), Y.int(), TypeError, r"^x must have a floating-point dtype, got torch.int32: use x.float\(\)"),
        (X, Y.double(), TypeError, "^x is torch.float32 but {second} is torch.float64: convert one"),
        (BAD, Y, ValueError, r"^x holds NaN or infinity in 2 of 20 rows \(2, 5\)"),
        (X, BAD, ValueError, r"^{second} holds NaN or infinity in 2 of 20 rows \(2, 5\)"),
    ],
)
def test_bad_samples(function, second, x, y, error, message):
    with pytest.raises(error, match=message.format(second=second)):
        function(x, y)


def test_the_gap_is_of_pairs():
    with pytest.raises(ValueError, match="x has 20 rows but mapped has 19: they are paired row by row"):
        monge_gap(X, Y[:-1])
    assert sinkhorn_divergence(X, Y[:-1]).isfinite()


@both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": -0.1}, "epsilon must be a positive finite number, got -0.1"),
        ({"epsilon": 0}, "epsilon must be a positive finite number, got 0"),
        ({"epsilon": math.nan}, "epsilon must be a positive finite number, got nan"),
        ({"epsilon": "0.1"}, "epsilon must be a positive finite number, got '0.1'"),
        ({"relative_epsilon": -0.1}, "relative_epsilon must be a positive finite number, got -0.1"),
        ({"relative_epsilon": math.inf}, "relative_epsilon must be a positive finite number, got inf"),
        ({"relative_epsilon": None}, "relative_epsilon must be a positive finite number .* got None"),
        ({"cost": "manhattan"}, "unknown cost 'manhattan': choose one of cosine, .*sqpnorm, or pass a function"),
        ({"cost": "pnorm(p=0)"}, "p must be a finite number of at least 1, got 0"),
        ({"cost": lambda x, y: (x - y).abs()}, "must reduce the last dimension only"),
        ({"solver": "fast"}, "solver must be one of auto, .*got 'fast'"),
    ],
)
def test_bad_options(function, second, options, message):
    with pytest.raises(ValueError, match=message):
        function(X, Y, **options)


@both
@pytest.mark.parametrize(
    ("cost", "error"), [(costs.Euclidean, "got the class Euclidean"), (3, "got 3"), (None, "got None")]
)
def test_what_is_no_cost(function, second, cost, error):
    with pytest.raises(TypeError, match=f"cost must be .*{error}"):
        function(X, Y, cost=cost)


@pytest.mark.parametrize("convention", ["Shannon", "entropy", None, ""])
def test_unknown_conventions(convention):
    with pytest.raises(ValueError, match="convention must be one of shannon, kl, debiased, got"):
        monge_gap(X, Y, convention=convention)


@pytest.mark.parametrize("rho", [0, -1.0, math.nan, "far"])
def test_bad_rho(rho):
    with pytest.raises(ValueError, match="rho must be a positive finite number, got"):
        sinkhorn_divergence(X, Y, rho=rho)


WEIGHTS = [
    (np.full(20, 0.05), TypeError, "must be a tensor or None, got ndarray"),
    (torch.ones(19) / 19, ValueError, r"must have shape \(20,\), one weight a sample, got \(19,\)"),
    (torch.ones(20), ValueError, "must sum to 1, got 20: divide it by its sum"),
    (torch.tensor([-0.05, 0.15] + [0.05] * 18), ValueError, "must be finite and non-negative, got -0.05.* in row 0"),
    (torch.tensor([0.05] * 19 + [math.nan]), ValueError, "must be finite and non-negative, got nan in row 19"),
]


@pytest.mark.parametrize(("weights", "error", "message"), WEIGHTS)
def test_bad_weights(weights, error, message):
    with pytest.raises(error, match=f"^weights {message}"):
        monge_gap(X, Y, weights=weights)
    for side in (0, 1):
        pair = (weights, None) if side == 0 else (None, weights)
        with pytest.raises(error, match=rf"^weights\[{side}\] {message}"):
            sinkhorn_divergence(X, Y, weights=pair)


@both
def test_points_off_the_sphere(function, second):
    with pytest.raises(ValueError, match=r"^x has \d+ points off the unit sphere \(first at row 0\): divide"):
        function(X, SPHERE, cost="geodesic")
    with pytest.raises(ValueError, match=rf"^{second} has \d+ points off the unit sphere"):
        function(SPHERE, X, cost="geodesic")
    assert function(SPHERE, SPHERE.flip(0), cost="geodesic").isfinite()


@both
def test_zero_vectors(function, second):
    with pytest.raises(ValueError, match=r"^x has 1 zero vectors \(first at row 4\), which have no cosine: remove"):
        function(ZERO, Y, cost="cosine")
    with pytest.raises(ValueError, match=rf"^{second} has 1 zero vectors"):
        function(X, ZERO, cost="cosine")


@both
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "pnorm(p=1.5)", "cosine"])
@pytest.mark.parametrize("n", [1, 5])
def test_samples_without_any_cost_have_neither_divergence_nor_gap(function, second, n, cost):
    same = torch.full((n, 2), 3.0, requires_grad=True)
    value = function(same, same.detach().clone(), cost=cost)
    assert float(value.detach().abs()) < 1e-30
    (gradient,) = torch.autograd.grad(value, same)
    assert float(gradient.abs().max()) < 1e-6
    assert function(same, same, epsilon=0.1, cost=cost).isfinite()


@both
def test_the_online_solver_needs_a_formula(function, second):
    with pytest.raises(ValueError, match=r"solver='online' needs a KeOps formula.*use 'blocked'"):
        function(X, Y, cost=lambda x, y: (x - y).abs().amax(-1), solver="online")


@both
def test_nothing_is_changed_in_place(function, second):
    x, y = X.clone(), Y.clone()
    function(x, y)
    assert torch.equal(x, X)
    assert torch.equal(y, Y)


@both
def test_the_old_name_of_rho_is_understood(function, second):
    old = {"reach": 0.5} | ({"convention": "kl"} if function is monge_gap else {})
    new = {"rho": 0.5} | ({"convention": "kl"} if function is monge_gap else {})
    with pytest.warns(DeprecationWarning, match="reach is called rho now: write rho=0.5"):
        value = function(X, Y, **old)
    assert torch.equal(value, function(X, Y, **new))
    with pytest.raises(TypeError, match="reach is the old name of rho: give rho alone"):
        function(X, Y, **(old | new))


@pytest.mark.compiler
def test_keops_is_geomloss_on_matrices():
    """Value and gradient through KeOps, and through dense matrices."""
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(200, 2, generator=generator) + 1
    epsilon = float(0.05 * torch.cdist(y, y).square().mean())
    both = torch.cat([torch.randn(200, 2, generator=torch.Generator().manual_seed(2)), y])
    squared = costs.SqEuclidean().pairwise
    matrices = SamplesLoss(
        "sinkhorn", p=1, blur=epsilon, scaling=0.9, diameter=2 * float(squared(both, both).max()), cost=squared,
        debias=False, backend="tensorized",
    )  # fmt: skip
    results = []
    for function in (
        lambda x, y: optimal_transport(x, y, epsilon=epsilon, solver="online").value,
        matrices,
    ):
        x = torch.randn(200, 2, generator=torch.Generator().manual_seed(2)).requires_grad_()
        value = function(x, y)
        results.append((value.detach(), torch.autograd.grad(value, x)[0]))
    (online, online_gradient), (dense, dense_gradient) = results
    torch.testing.assert_close(online, dense, rtol=1e-4, atol=1e-5)
    assert (online_gradient - dense_gradient).norm() < 1e-3 * dense_gradient.norm()
