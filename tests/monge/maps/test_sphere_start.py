"""A map of the sphere that starts at a plan: near the truth, or else exactly the identity."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_gap.monge import EntropicMap, SphereMap, StartPair, energy_distance


def points(n: int, seed: int) -> Tensor:
    """Points about the north pole, and all of the sphere with some weight."""
    noise = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    return normalize(noise + torch.tensor([0, 0, 1.5]), dim=1)


def dilated(x: Tensor) -> Tensor:
    """Points moved from the pole along their meridians, in order: optimal for every cost of the angle."""
    angle = x[:, 2:].clamp(-1, 1).acos()
    further = angle + 0.6 * torch.sin(angle)
    return torch.cat([further.sin() * normalize(x[:, :2], dim=1), further.cos()], dim=1)


def error(images: Tensor, truth: Tensor) -> float:
    return float((images - truth).detach().norm(dim=1).mean())


def test_it_is_nearer_the_optimal_map_than_the_identity_and_starts_once():
    torch.manual_seed(0)
    x, y, new = points(1000, 0), dilated(points(1000, 1)), points(300, 2)
    net = SphereMap(3, (64, 64), start="plan")
    state = torch.get_rng_state()
    net.start(x, y)
    assert torch.equal(torch.get_rng_state(), state)
    plan = EntropicMap(3, "geodesic")
    plan.start(x, y)
    # As near as the plan that it was fitted to; what that lacks is due to the samples.
    assert error(net(new), dilated(new)) < 1.2 * error(plan(new), dilated(new))
    assert error(net(new), dilated(new)) < error(new, dilated(new)) / 2
    torch.testing.assert_close(net(new).norm(dim=1), torch.ones(300))
    again = SphereMap(**net.hparams)
    again.load_state_dict(net.state_dict())
    again.start(x, x)
    assert torch.equal(again(new), net(new))


def test_each_condition_has_a_plan():
    torch.manual_seed(0)
    net, new = SphereMap(3, (64, 64), start="plan", num_conditions=2), points(200, 2)
    pairs = []
    for k in range(2):
        y = dilated(points(600, 1 + k))
        pairs.append(StartPair(points(600, 0), y if k == 0 else points(600, 5), torch.tensor(k)))
    net.start(torch.cat([p.source for p in pairs]), torch.cat([p.target for p in pairs]), pairs=pairs)
    label = torch.zeros(200, dtype=torch.long)
    assert error(net(new, label), dilated(new)) < 0.6 * error(new, dilated(new))
    assert error(net(new, label + 1), new) < error(net(new, label), new)


@pytest.mark.parametrize("n", [20, 300])
def test_it_stays_the_identity_where_nothing_is_told(n):
    net = SphereMap(3, (16,), start="plan")
    net.start(points(n, 0), points(n, 1))
    x = points(50, 2)
    torch.testing.assert_close(net(x), x)
    assert bool(net.started)


def test_samples_off_the_sphere_are_refused_before_anything_changes():
    net = SphereMap(3, (16,), start="plan")
    with pytest.raises(ValueError, match="target has 5 points off the unit sphere"):
        net.start(points(5, 0), 2 * points(5, 1))
    assert not bool(net.started)
    with pytest.raises(ValueError, match="this map is conditional: give start"):
        SphereMap(3, (16,), start="plan", num_conditions=2).start(points(5, 0), points(5, 1))
    with pytest.raises(ValueError, match="start must be one of identity, plan, got 'mean'"):
        SphereMap(3, (16,), start="mean")


def cap(n, center, spread, seed):
    z = torch.tensor(center) + spread * torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    return z / z.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("spread", [0.3, 0.05, 0.002])
def test_samples_are_told_apart_however_close_they_are(spread):
    x, y = cap(800, [0.0, 0.0, 1.0], spread, 0), cap(800, [0.0, 0.5, 1.0], 0.3, 1)
    torch.manual_seed(0)
    net = SphereMap(3, (64, 64), start="plan", plan_steps=600)
    net.start(x, y)
    new, held_out = cap(800, [0.0, 0.0, 1.0], spread, 2), cap(800, [0.0, 0.5, 1.0], 0.3, 3)
    with torch.no_grad():
        assert float(energy_distance(net(new), held_out)) < 0.02


def test_a_state_of_before_there_were_units_is_the_map_that_it_was():
    torch.manual_seed(0)
    old = SphereMap(3, (8,), start="plan")
    torch.nn.init.normal_(old.displacement[-1].weight)
    old.started.fill_(1)
    state = {name: value for name, value in old.state_dict().items() if name not in ("center", "scale")}
    net = SphereMap(3, (8,), start="plan")
    net.start(cap(200, [0.0, 0.0, 1.0], 0.1, 0), cap(200, [1.0, 0.0, 0.0], 0.1, 1))
    net.load_state_dict(state)
    x = cap(10, [0.0, 0.0, 1.0], 0.5, 2)
    assert torch.equal(net(x), old(x))
