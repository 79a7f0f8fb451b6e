"""What is held out, and how much of a network a map takes beside the Gaussian map."""

from importlib import import_module

import pytest
import torch

from lightning_gap.monge import BrenierMap
from lightning_gap.monge.maps.descent import drawn_rows
from lightning_gap.monge.maps.energy_fit import energy_gain
from lightning_gap.monge.maps.hold_out import choose_share, held_samples, hold_out
from lightning_gap.monge.maps.starts import StartPair
from lightning_gap.monge.ot import subsets
from lightning_gap.monge.ot.gaussian import gaussian_map

energy_fit, semidual = (import_module(f"lightning_gap.monge.maps.{name}") for name in ("energy_fit", "semidual"))


def draws(n: int, dim: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "dim"), [(60, 2), (99, 2), (300, 100)])
def test_of_few_samples_none_is_held_out_and_the_map_is_the_gaussian_one(n, dim):
    x, y = draws(n, dim), 2 * draws(n, dim, 1) + 1
    assert hold_out(StartPair(x, y))[0] is None
    if dim > 2:
        return
    net = BrenierMap(dim, (4,))
    net.start(x, y)
    A, b = gaussian_map(x, y, shrinkage="auto")
    assert float(net.share) == 0
    torch.testing.assert_close(net(x), (x.double() @ A + b).float())


def test_each_sample_is_on_one_side_and_a_fifth_is_held_out():
    x, y = draws(400), draws(250, seed=1)
    held, rest = hold_out(StartPair(x, y))
    assert (len(held.source), len(held.target)) == (80, 50)
    for whole, parts in ((x, (held.source, rest.source)), (y, (held.target, rest.target))):
        assert sorted(map(tuple, whole.tolist())) == sorted(map(tuple, torch.cat(parts).tolist()))
    again = hold_out(StartPair(x, y))[0]
    assert torch.equal(held.source, again.source)


@pytest.mark.parametrize(("n", "most", "count"), [(3000, 1024, 600), (20_000, 1024, 1250), (20_000, 4096, 4000)])
def test_a_part_of_many_is_held_out(n, most, count):
    assert len(hold_out(StartPair(draws(n), draws(n)), most)[0].source) == count


def test_no_more_are_held_out_than_whose_pairs_can_be_looked_at():
    n = 1_000_000
    held, rest = hold_out(StartPair(draws(n, 1), draws(300, 1)))
    assert (len(held.source), len(held.target)) == (8192, 60)
    assert len(rest.source) == n - 8192


@pytest.mark.parametrize("weighted", [False, True])
def test_energy_distances_in_blocks_are_those_of_all_pairs(weighted, monkeypatch):
    x, y = draws(90).double(), draws(70, seed=1).double() + 1
    weights = [torch.rand(len(z), dtype=torch.float64) + 0.1 for z in (x, y)]
    pair = StartPair(x, y, None, *([w / w.sum() for w in weights] if weighted else []))
    whole = energy_gain([x + 1], [1.1 * x], [pair])
    monkeypatch.setattr(energy_fit, "_BLOCK", 16)
    assert energy_gain([x + 1], [1.1 * x], [pair]) == pytest.approx(whole)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_semidual_of_very_many_samples_is_fitted_on_some(weighted, monkeypatch):
    x, y = draws(300), 2 * draws(400, seed=1)
    y[:200] += 50
    weights = torch.ones(400)
    weights[:200] = 0
    looked_at = []
    net = BrenierMap(2, (8,), start="gaussian")
    net.start(x, y[200:])
    inverse = net.inverse
    monkeypatch.setattr(net, "inverse", lambda y, **options: looked_at.append(y) or inverse(y, **options))
    monkeypatch.setattr(semidual, "_MOST_KEPT", 100)
    semidual.fit_semidual(net, x, y, weights=(None, weights if weighted else None), steps=3)
    (found,) = looked_at
    assert len(found) == 100
    assert bool((found > 25).any()) != weighted
    assert weighted or len(found.unique(dim=0)) == 100


def test_rows_of_more_than_a_multinomial_takes_are_drawn_by_weight(monkeypatch):
    monkeypatch.setattr(subsets, "_MOST_CATEGORIES", 3)
    weights = torch.tensor([0.0, 1.0, 0.0, 3.0, 0.0])
    rows = drawn_rows(draws(5).repeat(4000, 1), weights.repeat(4000), 20_000, torch.Generator().manual_seed(0))
    counts = torch.bincount(rows % 5, minlength=5) / len(rows)
    torch.testing.assert_close(counts, weights / 4, atol=0.02, rtol=0)
    assert len(rows) == 20_000


def test_samples_without_weight_are_in_neither_part():
    x, y = draws(400), draws(400, seed=1)
    weights = torch.ones(400, dtype=torch.float64)
    weights[:200] = 0
    held, rest = hold_out(StartPair(x, y, None, weights / weights.sum(), None))
    assert (len(held.source), len(rest.source)) == (40, 160)
    gone = set(map(tuple, x[:200].tolist()))
    assert not gone & set(map(tuple, torch.cat([held.source, rest.source]).tolist()))
    assert float(rest.source_weights.sum()) == pytest.approx(1)
    few = torch.zeros(400, dtype=torch.float64)
    few[:50] = 1 / 50
    assert hold_out(StartPair(x, y, None, few, None))[0] is None


def fitted(x: torch.Tensor, y: torch.Tensor) -> tuple[BrenierMap, StartPair]:
    torch.manual_seed(0)
    net = BrenierMap(2, (16,), plan_steps=400, finish_steps=50)
    net.start(x, y)
    return net, hold_out(StartPair(x, y))[0]


def test_a_network_that_is_no_better_than_the_gaussian_map_has_no_share():
    x, y = draws(300), 2 * draws(300, seed=1)
    net, held = fitted(x, y)
    with torch.no_grad():
        net.offset += 5  # spoils the network
    assert choose_share(net, held_samples(held)) == 0
    assert float(net.share) == 0


def test_a_network_that_finds_what_no_affine_map_does_has_most_of_the_map():
    x = draws(500)
    y = draws(500, seed=1)
    y = y + 3 * y.sign()
    net, held = fitted(x, y)
    assert float(net.share) >= 0.5
    assert choose_share(net, held_samples(held)) == pytest.approx(float(net.share))


def test_weights_that_are_not_finite_leave_the_gaussian_map():
    x, y = draws(300), 2 * draws(300, seed=1)
    net, held = fitted(x, y)
    with torch.no_grad():
        net.curvature.fill_(float("nan"))
    assert choose_share(net, held_samples(held)) == 0
