"""The bound of a map's error and what a map pays in vain, against maps that are known."""

import math

import pytest
import torch
from monge_runs import trainer

from lightning_gap import MongeMap, SamplesDataModule
from lightning_gap.monge import BrenierMap, MapScores, error_certificate, gaussian_map, suboptimality
from lightning_gap.monge.ot.costs import resolve
from lightning_gap.monge.scores.certificate import has_unique_maps
from lightning_gap.monge.scores.parts import independent_parts


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Quadratic:
    """The gradient of ½ xᵀAx + bᵀx."""

    def __init__(self, A, b):
        self.A, self.b = A, b

    def __call__(self, x):
        return x @ self.A + self.b

    def potential(self, x):
        return (x @ self.A * x).sum(1) / 2 + x @ self.b

    def hessian(self, x):
        return self.A.expand(len(x), -1, -1)

    def inverse(self, y):
        return torch.linalg.solve(self.A, (y - self.b).mT).mT


def positive(seed, d):
    root = normal(seed, d, d) / math.sqrt(d)
    return root @ root.mT + 0.3 * torch.eye(d, dtype=torch.float64)


@pytest.mark.parametrize("d", [1, 2, 5, 16])
@pytest.mark.parametrize("error", [0.05, 0.5])
def test_bounds_hold_for_wrong_gaussian_maps(d, error):
    for seed in range(3):
        true, wrong = positive(seed, d), positive(seed, d) + error * positive(seed + 50, d)
        b = error * normal(seed + 100, d)
        x, y = normal(seed + 1000, 800, d), normal(seed + 2000, 700, d) @ true
        T = Quadratic(wrong, b)
        found = error_certificate(x, T(x), y, convex=T)
        truth = 100 * float((wrong - true).square().sum() + b.square().sum()) / float(true.square().sum())
        assert truth <= found.upper
        assert truth <= found.proven
        assert found.upper <= 10 * truth or found.upper <= 3 * found.noise + 10


def test_bound_falls_with_samples_and_is_that_of_the_units():
    x, y = normal(1, 1000, 2), 3 * normal(2, 1000, 2)
    few, many = (error_certificate(x[:n], 3 * x[:n], y[:n]).upper for n in (100, 1000))
    assert many < few
    scaled = error_certificate(10 * x[:100], 30 * x[:100] + 5, 10 * y[:100] + 5).upper
    assert scaled == pytest.approx(few)


def test_another_cost_has_its_own_maps():
    # Monotone in each coordinate, which is optimal for sums over coordinates.
    x, y = normal(3, 1000, 2), normal(4, 1000, 2)
    true = torch.sinh
    found = error_certificate(x, true(x) + 0.5, true(y), cost="pnorm(p=1.5)")
    truth = 100 * 0.5 / float(true(y).var(0, correction=0).sum())
    assert truth <= found.upper <= 10 * truth


def test_weights_stand_for_samples():
    x, y = normal(5, 600, 2), normal(6, 600, 2)
    w = torch.cat([torch.full((300,), 1 / 300), torch.zeros(300)]).double()
    far = torch.cat([y[:300], y[300:] + 100])
    found = error_certificate(x, x + 1, far, weights=(None, w))
    assert 60 < found.upper < 200  # 100 · 2 / 2
    with pytest.raises(ValueError, match="the worth of 1 samples"):
        error_certificate(x, x, y, weights=(None, torch.eye(600).double()[0] * 0.999 + 1e-3 / 600))


def test_parts_are_disjoint_and_alike_in_each_call():
    x, y = normal(7, 101, 2), normal(8, 90, 2)
    rows, columns = independent_parts(("x", "y"), (x, y), (None, None), 4096, 4)
    assert {len(part) for part in rows + columns} == {22}
    assert len(set(torch.cat(rows).tolist())) == len(set(torch.cat(columns).tolist())) == 88
    state = torch.get_rng_state()
    again, _ = independent_parts(("x", "y"), (x, y), (None, None), 4096, 4)
    assert all(map(torch.equal, rows, again))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((normal(1, 20, 2), normal(2, 20, 2), normal(3, 20, 2)), {}, "source has 20 samples, too few"),
        ((normal(1, 90, 2), normal(2, 90, 2), normal(3, 1, 2).expand(90, 2)), {}, "target does not vary"),
        ((normal(1, 90, 2), normal(2, 80, 2), normal(3, 90, 2)), {}, "paired row by row"),
        ((normal(1, 90, 2), normal(2, 90, 2), normal(3, 90, 2)), {"cost": "euclidean"}, "no unique optimal maps"),
        ((normal(1, 90, 2), normal(2, 90, 2), normal(3, 90, 2)), {"max_samples": 8}, "max_samples"),
    ],
)
def test_what_says_nothing_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        error_certificate(*arguments, **options)


def test_costs_with_unique_maps():
    x = normal(1, 3, 2)
    unique = {
        name: has_unique_maps(resolve(name), x) for name in ("sqeuclidean", "pnorm(p=1.5)", "euclidean", "cosine")
    }
    assert unique == {"sqeuclidean": True, "pnorm(p=1.5)": True, "euclidean": False, "cosine": False}


@pytest.mark.parametrize("d", [2, 8])
def test_suboptimality_of_linear_maps_holds_the_closed_form(d):
    for seed in range(3):
        S = positive(seed, d)
        skew = normal(seed + 30, d, d) / math.sqrt(d)
        A = 1.5 * torch.matrix_exp(skew - skew.mT)
        x = normal(seed + 60, 800, d) @ torch.linalg.cholesky(S).mT
        root = torch.linalg.cholesky(S)
        paid = torch.trace((A - torch.eye(d)) @ S @ (A - torch.eye(d)).mT)
        best = torch.trace(S) + torch.trace(A @ S @ A.mT) - 2 * torch.linalg.svdvals(root.mT @ A @ root).sum()
        found = suboptimality(x, x @ A.mT)
        assert found.value <= 100 * float((paid - best) / paid) + 5
        assert 100 * float((paid - best) / paid) <= found.upper


@pytest.mark.parametrize("cost", ["euclidean", "sqeuclidean", "pnorm(p=3)"])
def test_what_is_optimal_pays_nothing_in_vain(cost):
    x = normal(9, 500, 2)
    found = suboptimality(x, x + 1, cost=cost)
    assert found.value == pytest.approx(0, abs=1e-6)
    assert found.upper < 35
    assert suboptimality(x, x, cost=cost).upper == 0


def test_scores_have_certificates_where_they_are_wanted(monkeypatch):
    x, y = normal(10, 300, 2), normal(11, 300, 2) + 2
    with_them, without = MapScores(certificates=True), MapScores()
    for scores in (with_them, without):
        for part in zip(x.split(100), (x + 2).split(100), y.split(100), strict=True):
            scores.update(*part)
    found, names = with_them.compute(), {"suboptimality", "suboptimality_upper", "l2_uvp_bound"}
    assert set(found) - set(without.compute()) == names
    assert float(found["l2_uvp_bound"]) == pytest.approx(error_certificate(x, x + 2, y).upper)
    heard: list[str] = []
    monkeypatch.setattr("lightning_gap.monge.scores.map_scores.rank_zero_info", heard.append)
    few = MapScores(certificates=True)
    few.update(x[:30], x[:30], y[:30])
    assert not names & set(few.compute())
    assert "no bound of the map's error" in heard[0]


def test_a_test_logs_them_and_says_the_bound(capsys):
    x, y = normal(12, 400, 2).float(), normal(13, 400, 2).float() + 2
    run = trainer(max_epochs=1)
    model = MongeMap(map=BrenierMap(2, (8,)), gap_weight=0)
    data = SamplesDataModule(x, y, batch_size=100, test_fraction=0.5)
    run.fit(model, data)
    (logged,) = run.test(model, data, verbose=False)
    bound = logged["lightning_gap/monge/test_l2_uvp_bound"]
    assert f"L2-UVP ≤ {bound:.3g} %, 95 %" in capsys.readouterr().out
    assert logged["lightning_gap/monge/test_suboptimality"] <= logged["lightning_gap/monge/test_suboptimality_upper"]
    assert not [name for name in run.callback_metrics if "val_l2_uvp_bound" in name]


def test_a_gaussian_map_from_samples_is_bounded():
    true = positive(3, 4)
    x, y = normal(20, 2000, 4), normal(21, 2000, 4) @ true
    A, b = gaussian_map(x[:1000], y[:1000])
    held = x[1000:]
    error = 100 * float((held @ A + b - held @ true).square().sum(1).mean()) / float(true.square().sum())
    assert error <= error_certificate(held, held @ A + b, y[1000:]).upper
