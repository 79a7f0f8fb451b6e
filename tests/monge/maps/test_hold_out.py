"""What is held out, and how much of a network a map takes beside the Gaussian map."""

import pytest
import torch

from lightning_gap.monge import BrenierMap
from lightning_gap.monge.maps.hold_out import choose_share, held_samples, hold_out
from lightning_gap.monge.maps.starts import StartPair
from lightning_gap.monge.ot.gaussian import gaussian_map


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
