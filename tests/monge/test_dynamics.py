"""MongeMap backwards and part of the way: raw samples in, raw samples out."""

from functools import partial

import numpy as np
import pytest
import torch
from monge_runs import gaussians, samples, small, trainer
from torch import nn

from lightning_gap import MongeMap
from lightning_gap.monge import (
    AffineRepresentation,
    BrenierMap,
    ConditionalMap,
    ResidualMLP,
    SphereMap,
    gaussian_map,
)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gaussian_model(d, dtype=torch.float64):
    """The map between Gaussians, as a network that has started there."""
    x = normal(400, d).to(dtype)
    mixing = torch.eye(d, dtype=dtype) + 0.3 * normal(d, d, seed=1).to(dtype)
    y = normal(400, d, seed=2).to(dtype) @ mixing + 4
    net = ResidualMLP(d, (8,), start="gaussian").to(dtype)
    net.start(x, y)
    return MongeMap(map=net), x, y


@pytest.mark.parametrize("d", [1, 2, 10])
def test_the_inverse_of_the_gaussian_map_is_that_of_the_way_back(d):
    model, x, y = gaussian_model(d)
    A, b = gaussian_map(y, x)
    torch.testing.assert_close(model.inverse(y), y @ A + b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("t", [0, 0.3, 1])
@pytest.mark.parametrize("d", [1, 3])
def test_gaussians_move_along_bures_geodesic(d, t):
    model, x, _ = gaussian_model(d)
    A, b = gaussian_map(x, model.transport(x))
    way = (1 - t) * torch.eye(d) + t * A
    moved = model.interpolate(x, t)
    torch.testing.assert_close(moved.T.cov().view(d, d), way @ x.T.cov().view(d, d) @ way, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moved.mean(0), way @ x.mean(0) + t * b, rtol=1e-6, atol=1e-6)


def test_several_times_are_a_stack():
    model, x, _ = gaussian_model(2)
    points = model.interpolate(x, [0, 0.5, 1])
    assert points.shape == (3, 400, 2)
    torch.testing.assert_close(points[0], x)
    torch.testing.assert_close(points[2], model.transport(x))
    assert torch.equal(model.interpolate(x, torch.tensor([0.5]))[0], points[1])
    assert torch.equal(model.interpolate(x, np.linspace(0, 1, 3)), points)
    assert torch.equal(model.interpolate(x, torch.tensor(0.5)), points[1])
    assert torch.equal(model.interpolate(x, 0.5, batch_size=7), points[1])


@pytest.mark.parametrize("t", [-0.1, 1.5, float("nan"), [0.5, 2], [], "now", True, [[0.5]]])
def test_other_times_are_refused(t):
    model, x, _ = gaussian_model(2)
    with pytest.raises((TypeError, ValueError), match=r"\bt\b"):
        model.interpolate(x, t)


def test_a_trained_map_in_coordinates_of_its_own_is_undone_in_raw_ones():
    data = samples(300, standardize=True, batch_size=64)
    model = small(None, map=ResidualMLP(2, (16,), start="gaussian"), optimizer=partial(torch.optim.Adam, lr=1e-3))
    trainer(max_epochs=5).fit(model, data)
    x = gaussians(300)[0]
    y = model.transport(x)
    model.train()
    torch.testing.assert_close(model.inverse(y), x, rtol=0, atol=1e-3)
    torch.testing.assert_close(model.interpolate(x, 0.5), (x + y) / 2, rtol=0, atol=1e-4)
    assert model.training


def test_components_keep_what_they_span():
    x = normal(100, 5)
    representation = AffineRepresentation.fit(x, standardize=True, components=2)
    net = ResidualMLP(2, (8,), start="mean")
    net.start(normal(50, 2), normal(50, 2) + 1)
    model = MongeMap(map=net, representation=representation)
    projected = representation.decode(representation.encode(x))
    torch.testing.assert_close(model.interpolate(x, 0), projected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.inverse(model.transport(x)), projected, rtol=0, atol=1e-3)
    assert model.inverse(x).shape == (100, 5)


@pytest.mark.parametrize("vectors", [False, True])
def test_each_sample_has_the_inverse_under_its_condition(vectors):
    torch.manual_seed(0)
    kind = {"condition_dim": 1} if vectors else {"num_conditions": 3}
    net = ConditionalMap(2, (16,), **kind).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    names = None if vectors else ["a", "b", "c"]
    model = MongeMap(map=net, condition_names=names)
    x = normal(60, 2).double()
    condition = torch.linspace(0, 1, 60).double()[:, None] if vectors else ["a", "b", "c"] * 20
    y = model.transport(x, condition)
    torch.testing.assert_close(model.inverse(y, condition), x, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.inverse(y, condition, near=x[:7]), x, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.interpolate(x, 0.5, condition), (x + y) / 2)
    with pytest.raises(ValueError, match="conditional"):
        model.inverse(y)


def test_a_convex_potential_has_its_own_inverse():
    net = BrenierMap(3, (16, 16))
    x = normal(300, 3)
    net.start(x, 2 * normal(300, 3, seed=1) + 1)
    model = MongeMap(map=net, gap_weight=0)
    torch.testing.assert_close(model.inverse(model.transport(x)), x, rtol=0, atol=1e-3)


def test_the_sphere_goes_along_great_circles():
    torch.manual_seed(0)
    net = SphereMap(3, (16,))
    nn.init.normal_(net.displacement[-1].weight, std=0.2)
    model = MongeMap(map=net, cost="geodesic", fitting_cost="geodesic")
    x = nn.functional.normalize(normal(50, 3), dim=1)
    y = model.transport(x)
    torch.testing.assert_close(model.inverse(y), x, rtol=0, atol=1e-3)
    points = model.interpolate(x, [0, 0.5, 1])
    torch.testing.assert_close(points.norm(dim=-1), torch.ones(3, 50))
    torch.testing.assert_close(points[1], nn.functional.normalize(x + y, dim=1), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="y has 50 points off the unit sphere"):
        model.inverse(2 * x)


class Square(nn.Module):
    def forward(self, x):
        return x**2


class Cubic(nn.Module):
    def forward(self, x):
        return x**3 - x


def test_what_is_not_reached_is_warned_of_in_numbers():
    model = MongeMap(map=Square())
    y = torch.tensor([[4.0], [-1.0], [9.0], [-4.0]])
    with pytest.warns(UserWarning, match=r"2 of 4 samples of y \(rows 1, 3\).*at most \(a distance of 4 ") as said:
        x = model.inverse(y)
    assert len(said) == 1
    assert x.isfinite().all()
    torch.testing.assert_close(x[[0, 2]].abs(), torch.tensor([[2.0], [3.0]]), rtol=0, atol=1e-4)


def test_a_map_that_folds_is_warned_of_and_near_chooses():
    model, y = MongeMap(map=Cubic()), torch.zeros(3, 1).double()
    y += torch.tensor([[-0.1], [0.0], [0.1]])
    for around in (-1, 1):
        near = torch.tensor([[around]]).double()
        assert ((model.inverse(y, near=near) - around).abs() < 0.1).all()
    x = torch.tensor([[-1.0], [0.1], [1.0]])
    with pytest.warns(UserWarning, match="the map folds, with 1 of 3 points"):
        model.inverse(x**3 - x, near=x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"y": torch.zeros(3)}, r"y must have shape \(n, d\)"),
        ({"y": torch.full((3, 2), float("nan"))}, "y holds NaN"),
        ({"y": torch.zeros(3, 2), "near": torch.full((3, 2), float("inf"))}, "near holds NaN"),
        ({"y": torch.zeros(3, 2), "condition": 0}, "no conditions"),
        ({"y": torch.zeros(3, 2), "tolerance": 0}, "tolerance must be a positive"),
        ({"y": torch.zeros(3, 2), "max_iterations": 0}, "max_iterations must be at least 1"),
        ({"y": torch.zeros(3, 5)}, "dimension"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        gaussian_model(2)[0].inverse(**arguments)


def test_no_samples_have_no_preimages():
    model, x, _ = gaussian_model(2)
    assert model.inverse(x[:0]).shape == (0, 2)
    assert model.interpolate(x[:0], [0, 1]).shape == (2, 0, 2)


def test_tables_go_by_name():
    pd = pytest.importorskip("pandas")
    net = ResidualMLP(2, start="mean")
    net.start(normal(50, 2), normal(50, 2) + torch.tensor([1.0, 5.0]))
    model = MongeMap(map=net, feature_names=["a", "b"])
    frame = pd.DataFrame({"b": [5.0], "a": [1.0]})
    torch.testing.assert_close(model.inverse(frame), torch.zeros(1, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.interpolate(frame, 1), torch.tensor([[2.0, 10.0]]))


def test_inference_mode_and_random_numbers_are_left_alone():
    model, x, _ = gaussian_model(2, torch.float32)
    state = torch.get_rng_state()
    with torch.inference_mode():
        torch.testing.assert_close(model.inverse(model.transport(x)), x, rtol=0, atol=1e-3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
