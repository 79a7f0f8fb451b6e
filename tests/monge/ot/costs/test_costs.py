"""Ground costs: matrix, pairs, gradients, conjugates, names."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_gap import costs
from lightning_gap.monge.costs import TranslationInvariantCost
from lightning_gap.monge.ot.epsilon import cost_scale
from lightning_gap.monge.ot.limits import LIMITS, Size


def chebyshev(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).abs().amax(-1)


NAMED = [
    costs.SqEuclidean(),
    costs.Euclidean(),
    costs.PNorm(1.0),
    costs.PNorm(1.5),
    costs.PNorm(3.0),
    costs.SqPNorm(1.5),
    costs.SqPNorm(3.0),
    costs.Elastic(0.7),
    costs.Cosine(),
    costs.Geodesic(),
]
ALL = [*NAMED, costs.CallableCost(chebyshev)]
every_cost = pytest.mark.parametrize("cost", ALL, ids=str)
every_named_cost = pytest.mark.parametrize("cost", NAMED, ids=str)


def points(cost: costs.Cost, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if isinstance(cost, costs.Geodesic):
        x = x / x.norm(dim=-1, keepdim=True)
    return x.to(dtype)


def definition(cost: costs.Cost, x: list[float], y: list[float]) -> float:
    """The cost of one pair, from its definition and by NumPy."""
    u, v = np.array(x), np.array(y)
    z = np.abs(u - v)
    match cost:
        case costs.SqEuclidean():
            return float((z**2).sum())
        case costs.Euclidean():
            return float((z**2).sum() ** 0.5)
        case costs.PNorm(p):
            return float((z**p).sum() / p)
        case costs.SqPNorm(p):
            return float((z**p).sum() ** (2 / p) / 2)
        case costs.Elastic(lam):
            return float((z**2).sum() / 2 + lam * z.sum())
        case costs.Cosine():
            return float(1 - u @ v / np.sqrt((u @ u) * (v @ v)))
        case costs.Geodesic():
            return float(np.arccos(u @ v))
        case _:
            return float(z.max())


def twin(cost: costs.Cost, x: Tensor, y: Tensor) -> Tensor:
    return torch.tensor([[definition(cost, a, b) for b in y.tolist()] for a in x.tolist()], dtype=torch.float64)


@every_cost
def test_pairwise_is_the_loop_over_all_pairs(cost):
    x, y = points(cost, 7, 3), points(cost, 5, 3, seed=1)
    torch.testing.assert_close(cost.pairwise(x, y), twin(cost, x, y), rtol=1e-12, atol=1e-13)


@every_cost
def test_paired_is_the_diagonal_of_pairwise(cost):
    x, y = points(cost, 9, 4), points(cost, 9, 4, seed=1)
    torch.testing.assert_close(cost.paired(x, y), cost.pairwise(x, y).diagonal(), rtol=1e-12, atol=1e-13)


@every_cost
def test_costs_are_batched(cost):
    x, y = points(cost, 3, 6, 2), points(cost, 3, 4, 2, seed=1)
    matrix = cost.pairwise(x, y)
    assert matrix.shape == (3, 6, 4)
    torch.testing.assert_close(matrix, torch.stack([cost.pairwise(a, b) for a, b in zip(x, y, strict=True)]))
    assert cost.paired(x, x.flip(1)).shape == (3, 6)


@every_cost
def test_pairwise_in_blocks_of_rows_is_pairwise(cost, monkeypatch):
    x, y = points(cost, 11, 3), points(cost, 6, 3, seed=1)
    whole = cost.pairwise(x, y)
    monkeypatch.setattr(LIMITS, "differences", Size(2 * y.numel(), 0))
    torch.testing.assert_close(cost.pairwise(x, y), whole)


@every_cost
@pytest.mark.parametrize("spread", [1.0, 1e-2])
def test_float32_pairwise_keeps_its_digits_far_from_the_origin(cost, spread):
    x, y = (points(cost, 20, 3, seed=s, dtype=torch.float32) for s in (0, 1))
    if not isinstance(cost, costs.Geodesic):
        x, y = x * spread + 1e3, y * spread + 1e3
    exact = cost.pairwise(x.double(), y.double())
    got = cost.pairwise(x, y)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(cost.paired(x, y).double(), exact.diagonal(), rtol=1e-5, atol=0.0)


@every_named_cost
def test_autocast_leaves_pairwise_alone(cost):
    x, y = points(cost, 8, 3, dtype=torch.float32), points(cost, 8, 3, seed=1, dtype=torch.float32)
    expected = cost.pairwise(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cost.pairwise(x, y), expected)


@every_named_cost
def test_half_precision_points_keep_their_dtype(cost):
    x, y = points(cost, 8, 3, dtype=torch.bfloat16), points(cost, 8, 3, seed=1, dtype=torch.bfloat16)
    got = cost.pairwise(x, y)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), cost.pairwise(x.double(), y.double()), rtol=2e-2, atol=2e-2)


@every_cost
def test_gradients_are_those_of_finite_differences(cost):
    x, y = points(cost, 4, 3).requires_grad_(), points(cost, 3, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(cost.pairwise, (x, y))
    assert torch.autograd.gradcheck(cost.paired, (x[:3], y))


@pytest.mark.parametrize("cost", [c for c in NAMED if c != costs.PNorm(1.0)], ids=str)
def test_second_gradients_are_those_of_finite_differences(cost):
    x, y = points(cost, 3, 2).requires_grad_(), points(cost, 2, 2, seed=1).requires_grad_()
    assert torch.autograd.gradgradcheck(cost.pairwise, (x, y))


@every_named_cost
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["pairwise", "paired"])
def test_coincident_points_cost_nothing_and_have_gradient_zero(cost, dtype, form):
    x = points(cost, 5, 3, dtype=dtype).requires_grad_()
    y = x.detach().clone().requires_grad_()
    value = getattr(cost, form)(x, y)
    value = value.diagonal() if form == "pairwise" else value
    assert value.abs().max() < 1e-7
    for gradient in torch.autograd.grad(value.sum(), (x, y)):
        assert gradient.isfinite().all()
        assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("form", ["pairwise", "paired"])
def test_geodesic_distance_of_antipodes_is_pi_with_finite_gradient(form):
    x = points(costs.Geodesic(), 5, 3).requires_grad_()
    value = getattr(costs.Geodesic(), form)(x, -x.detach())
    value = value.diagonal() if form == "pairwise" else value
    torch.testing.assert_close(value, torch.full_like(value, torch.pi), atol=1e-7, rtol=0)
    assert torch.autograd.grad(value.sum(), x)[0].isfinite().all()


def test_geodesic_gradient_lies_in_the_tangent_plane():
    x, y = points(costs.Geodesic(), 6, 3).requires_grad_(), points(costs.Geodesic(), 6, 3, seed=1)
    (gradient,) = torch.autograd.grad(costs.Geodesic().paired(x, y).sum(), x)
    torch.testing.assert_close((gradient * x).sum(-1), torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient.norm(dim=-1), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("p", [1.1, 20.0])
@pytest.mark.parametrize("size", [1e-3, 1e4])
def test_squared_p_norms_neither_underflow_nor_overflow(p, size):
    z = points(costs.SqPNorm(p), 6, 4)
    expected = costs.SqPNorm(p).h(z) * size**2
    torch.testing.assert_close(costs.SqPNorm(p).h((z * size).float()).double(), expected, rtol=1e-5, atol=0)


CONJUGATED = [
    costs.SqEuclidean(),
    *(costs.PNorm(p) for p in (1.5, 2, 3)),
    *(costs.SqPNorm(p) for p in (1.5, 2, 3)),
    costs.Elastic(0.0),
    costs.Elastic(0.7),
]


@pytest.mark.parametrize("cost", CONJUGATED, ids=str)
def test_gradient_of_the_conjugate_inverts_the_gradient(cost: TranslationInvariantCost):
    z = points(cost, 10, 4).requires_grad_()
    (w,) = torch.autograd.grad(cost.h(z).sum(), z)
    torch.testing.assert_close(cost.grad_h_conjugate(w), z, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("cost", CONJUGATED, ids=str)
def test_gradient_of_the_conjugate_is_zero_at_zero(cost: TranslationInvariantCost):
    assert torch.equal(cost.grad_h_conjugate(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_elastic_conjugate_leaves_small_coordinates_where_they_are():
    w = torch.tensor([[0.5, -0.69, 2.0]])
    torch.testing.assert_close(costs.Elastic(0.7).grad_h_conjugate(w), torch.tensor([[0.0, 0.0, 1.3]]))


@pytest.mark.parametrize("cost", [costs.Euclidean(), costs.PNorm(1.0)], ids=str)
def test_costs_that_are_not_strictly_convex_have_no_conjugate_map(cost: TranslationInvariantCost):
    with pytest.raises(NotImplementedError, match="not strictly convex"):
        cost.grad_h_conjugate(torch.ones(1, 2))


@every_named_cost
def test_a_cost_is_read_back_from_its_name(cost):
    assert costs.resolve(str(cost)) == cost
    assert costs.resolve(str(cost).upper().replace("P=", "p=").replace("LAM=", "lam=")) == cost
    assert costs.resolve(cost) is cost


@every_cost
def test_costs_are_frozen_hashable_and_copied(cost):
    assert {cost: 1}[copy.deepcopy(cost)] == 1
    assert pickle.loads(pickle.dumps(cost)) == cost
    with pytest.raises(AttributeError):
        cost.p = 2


@pytest.mark.parametrize("p", [2, np.float32(1.5), np.float64(1.5), np.int64(3)], ids=repr)
def test_parameters_of_any_number_type_print_as_plain_floats(p):
    assert costs.resolve(str(costs.PNorm(p))) == costs.PNorm(float(p))


@pytest.mark.parametrize(
    ("text", "cost"),
    [("pnorm(1.5)", costs.PNorm(1.5)), (" sqpnorm( p = 3 ) ", costs.SqPNorm(3)), ("elastic", costs.Elastic(1.0))],
)
def test_names_take_arguments(text, cost):
    assert costs.resolve(text) == cost


@pytest.mark.parametrize(
    ("cost", "error", "message"),
    [
        ("manhattan", ValueError, "unknown cost 'manhattan'.*sqeuclidean.*pass a function"),
        ("", ValueError, "unknown cost ''"),
        ("pnorm", ValueError, r"pnorm takes \(p"),
        ("pnorm()", ValueError, r"pnorm takes \(p"),
        ("pnorm(q=2)", ValueError, r"cannot be read: pnorm takes \(p"),
        ("pnorm(1.5", ValueError, "cannot be read"),
        ("pnorm(p=1.5) + 1", ValueError, "cannot be read"),
        ("pnorm(__import__('os'))", ValueError, "cannot be read"),
        ("euclidean(2)", ValueError, "cannot be read"),
        ("pnorm(0.5)", ValueError, "p must be a finite number of at least 1, got 0.5"),
        ("pnorm('2')", ValueError, "p must be a finite number"),
        (costs.PNorm, TypeError, r"got the class PNorm: write PNorm\(\.\.\.\)"),
        (2.0, TypeError, "name, a Cost or a function"),
        (None, TypeError, "name, a Cost or a function"),
    ],
)
def test_what_is_no_cost_is_refused(cost, error, message):
    with pytest.raises(error, match=message):
        costs.resolve(cost)


@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), "2", None, 0.99, -1])
def test_exponents_out_of_range_are_refused(value):
    with pytest.raises(ValueError, match="p must be a finite number of at least 1"):
        costs.PNorm(value)
    with pytest.raises(ValueError, match="p must be a finite number above 1"):
        costs.SqPNorm(value)


@pytest.mark.parametrize("value", [True, float("nan"), -0.1, "1"])
def test_elastic_weight_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match="lam must be a finite number of at least 0"):
        costs.Elastic(value)


def test_squared_p_norm_of_one_is_refused():
    with pytest.raises(ValueError, match="above 1"):
        costs.SqPNorm(1)


def test_functions_become_costs():
    cost = costs.resolve(chebyshev)
    assert cost == costs.CallableCost(chebyshev)
    assert str(cost) == "callable(chebyshev)"
    assert cost.keops_formula is None


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda x, y: (x - y).abs(), r"\(7, 5, 3\)"),
        (lambda x, y: (x - y).sum(), r"\(\)"),
        (lambda x, y: 1.0, "float"),
    ],
)
def test_functions_that_do_not_reduce_the_last_dimension_are_refused(function, got):
    with pytest.raises(ValueError, match=f"returned {got} for points .* must reduce the last dimension only"):
        costs.resolve(function).pairwise(torch.randn(7, 3), torch.randn(5, 3))


FACTOR = [[1.0, -0.5, 0.0], [0.25, 2.0, -1.0], [0.0, 0.3, 0.7]]


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_mahalanobis_is_the_squared_distance_of_the_images(rows):
    cost, A = costs.Mahalanobis(FACTOR[:rows]), torch.tensor(FACTOR[:rows], dtype=torch.float64)
    x, y = points(cost, 7, 3), points(cost, 5, 3, seed=1)
    z = x[:, None] - y
    expected = torch.einsum("ijd,kd,ke,ije->ij", z, A, A, z)
    torch.testing.assert_close(cost.pairwise(x, y), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cost.paired(x[:5], y), expected[:5].diagonal(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cost.geometry.fill(torch.empty(7, 5).double(), x, y), expected, rtol=1e-11, atol=1e-11)
    assert torch.autograd.gradcheck(cost.pairwise, (x.requires_grad_(), y.requires_grad_()))
    assert torch.autograd.gradgradcheck(cost.pairwise, (x, y))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(cost.pairwise(x.detach(), y.detach()), expected.detach())


def test_a_factor_that_is_to_learn_is_refused():
    with pytest.raises(ValueError, match=r"would learn nothing: give factor.detach\(\), or as the cost a function"):
        costs.Mahalanobis(torch.eye(2, requires_grad=True))


def test_mahalanobis_is_read_back_from_its_name():
    cost = costs.Mahalanobis(np.array(FACTOR))
    assert costs.resolve(str(cost)) == cost == costs.Mahalanobis(torch.tensor(FACTOR, dtype=torch.float64))
    assert {cost: 1}[pickle.loads(pickle.dumps(cost))] == 1


def test_mahalanobis_has_a_conjugate_where_it_is_strictly_convex():
    cost = costs.Mahalanobis(FACTOR)
    z = points(cost, 10, 3).requires_grad_()
    (w,) = torch.autograd.grad(cost.h(z).sum(), z)
    torch.testing.assert_close(cost.grad_h_conjugate(w), z, rtol=1e-9, atol=1e-10)
    with pytest.raises(NotImplementedError, match="not strictly convex"):
        costs.Mahalanobis(FACTOR[:2]).grad_h_conjugate(w)


@pytest.mark.parametrize("factor", [1.0, [], [[]], [[1.0], [1.0, 2.0]], [[float("nan")]], "ab"])
def test_factors_that_are_no_matrix_are_refused(factor):
    with pytest.raises(ValueError, match=r"factor must be a \(k, d\) matrix of finite numbers"):
        costs.Mahalanobis(factor)


def test_points_of_another_dimension_than_the_factor_are_refused():
    with pytest.raises(ValueError, match="x has dimension 2, but the factor of the mahalanobis cost has 3 columns"):
        costs.Mahalanobis(FACTOR).check_domain("x", torch.zeros(4, 2))


@every_cost
def test_scales_are_those_of_all_costs(cost, monkeypatch):
    x, y = points(cost, 7, 3), points(cost, 5, 3, seed=1)
    monkeypatch.setattr(LIMITS, "differences", Size(10, 0))
    matrix = cost.pairwise(x, y)
    assert cost_scale(cost, x, y, of="std") == pytest.approx(float(matrix.std(correction=0)), rel=1e-9)
    assert cost.mean(x, y) == pytest.approx(float(matrix.mean()), rel=1e-9)


def test_zero_vectors_have_no_cosine():
    x = torch.ones(5, 2)
    x[3] = 0
    with pytest.raises(ValueError, match=r"mapped has 1 zero vectors \(first at row 3\).*remove"):
        costs.Cosine().check_domain("mapped", x)
    costs.Cosine().check_domain("mapped", x[:3])


def test_points_off_the_sphere_are_refused():
    x = torch.eye(3)
    x[1] *= 1.01
    with pytest.raises(ValueError, match=r"x has 1 points off the unit sphere \(first at row 1\).*divide"):
        costs.Geodesic().check_domain("x", x)
    costs.Geodesic().check_domain("x", torch.eye(3))


def test_keops_constants_are_exact():
    assert "1e-05" not in costs.Elastic(1e-5).keops_formula
    numerator, denominator = costs.Elastic(1e-5).keops_formula.split("RatCst(")[2].split(")")[0].split(",")
    assert int(numerator) / int(denominator) == 1e-5


@pytest.mark.slow
@pytest.mark.compiler
def test_keops_formulas_are_the_costs():
    """Values and gradients of every formula, also where points coincide."""
    from pykeops.torch import Genred

    for cost in [*NAMED, costs.Elastic(1e-4)]:
        x, y = points(cost, 6, 3, dtype=torch.float32), points(cost, 5, 3, seed=1, dtype=torch.float32)
        y[0] = x[0]
        row_sums = Genred(f"{cost.keops_formula}", ["X = Vi(3)", "Y = Vj(3)"], reduction_op="Sum", axis=1)
        weighted = x.clone().requires_grad_()
        got = row_sums(weighted, y, backend="CPU")
        dense = x.clone().requires_grad_()
        expected = cost.pairwise(dense, y).sum(1, keepdim=True)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=lambda m, c=cost: f"{c}: {m}")
        gradients = [torch.autograd.grad(v.square().sum(), p)[0] for v, p in ((got, weighted), (expected, dense))]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4, msg=lambda m, c=cost: f"{c}: {m}")
