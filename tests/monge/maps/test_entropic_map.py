"""The map of an entropic plan: near the truth, by conditions, kept in checkpoints, and fitted without parameters."""

import copy
import io
import math
import pickle

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.nn.functional import normalize

from lightning_gap import MongeMap, SamplesDataModule, costs
from lightning_gap.monge import EntropicMap, StartPair, energy_distance


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bent(x: Tensor) -> Tensor:
    """The gradient of a convex function, and of separable form: optimal for every sum over coordinates."""
    return x + torch.tanh(3 * x) + 1


def error(images: Tensor, truth: Tensor) -> float:
    return float((images - truth).square().sum(1).mean() / truth.var(0).sum())


def quiet(**options):
    options = {"enable_checkpointing": False, **options}
    return Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, **options
    )  # fmt: skip


@pytest.mark.parametrize("cost", ["sqeuclidean", "pnorm(p=1.5)", "pnorm(p=3)", "elastic(lam=0.1)"])
def test_it_is_near_the_optimal_map_on_new_points(cost):
    x, y, new = normal(600, 2), bent(normal(600, 2, seed=1)), normal(300, 2, seed=2)
    net = EntropicMap(2, cost, relative_epsilon=0.01)
    net.start(x, y)
    assert error(net(new), bent(new)) < 0.03
    assert error(new + 1, bent(new)) > 0.05


def test_a_gaussian_is_carried_by_the_closed_form_of_its_entropic_map():
    # Of Gaussians the map is linear; on the line, for |x - y|² and a plan of conditional variance s².
    n, sigma, epsilon = 4000, 2.0, 0.5
    quantiles = torch.distributions.Normal(0, 1).icdf((torch.arange(n).double() + 0.5) / n)[:, None]
    net = EntropicMap(1, epsilon=epsilon).double()
    net.start(quantiles, sigma * quantiles)
    # The slope is cov(x, y) / var(x), where cov² + (ε/2) cov = var(x) var(y).
    slope = (math.sqrt((epsilon / 2) ** 2 / 4 + sigma**2)) - epsilon / 4
    points = torch.tensor([[-1.0], [0.5], [1.0]], dtype=torch.float64)
    torch.testing.assert_close(net(points), slope * points, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("cost", ["sqeuclidean", costs.Mahalanobis([[1.0, 0.5], [0.0, 2.0]])])
def test_the_way_between_means_does_not_blur_a_plan_for_squares(cost):
    x, y = normal(200, 2), bent(normal(200, 2, seed=1))
    near, far = EntropicMap(2, cost).double(), EntropicMap(2, cost).double()
    near.start(x.double(), y.double())
    far.start(x.double(), y.double() + 1000)
    torch.testing.assert_close(far(x.double()), near(x.double()) + 1000, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("ratio", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("cost", ["sqeuclidean", "pnorm(p=1.5)", "sqpnorm(p=1.5)"])
def test_samples_close_together_beside_the_others_have_a_sharp_plan(cost, ratio):
    g = torch.Generator().manual_seed(0)
    x, new = (ratio * torch.randn(500, 2, generator=g) for _ in range(2))
    y = 0.3 * torch.randn(500, 2, generator=g) + 3 * torch.randint(0, 2, (500, 1), generator=g)
    net = EntropicMap(2, cost)
    net.start(x, y)
    # The floor of as many samples is .01.
    assert float(energy_distance(net(new), y)) < 0.05


@pytest.mark.parametrize("spread", [1.0, 0.002])
def test_directions_close_together_have_a_sharp_plan(spread):
    g = torch.Generator().manual_seed(0)
    x, y = (normalize(s * torch.randn(500, 3, generator=g) + torch.tensor(to), dim=1) for s, to in (
        (spread, [0.0, 0.0, 1.0]), (0.3, [0.0, 0.5, 1.0]),
    ))  # fmt: skip
    net = EntropicMap(3, "geodesic")
    net.start(x, y)
    assert float(energy_distance(net(x), y)) < 0.02


def test_rays_are_followed_for_the_euclidean_cost():
    def inwards(x: Tensor) -> Tensor:  # along rays to the origin, in order: optimal for |x - y|
        return 0.5 * x

    x, y, new = normal(800, 2), inwards(normal(800, 2, seed=1)), normal(300, 2, seed=2)
    errors = []
    for tie_break in (0.3, 0.0):
        net = EntropicMap(2, "euclidean", tie_break=tie_break)
        net.start(x, y)
        errors.append(error(net(new), inwards(new)))
    assert errors[0] < 0.05 < error(new, inwards(new))
    assert errors[0] < errors[1]


def test_on_the_sphere_images_are_on_the_sphere():
    x = normalize(normal(200, 3), dim=-1)
    net = EntropicMap(3, "geodesic")
    net.start(x, normalize(x + torch.tensor([0.5, 0.0, 0.0]), dim=-1))
    torch.testing.assert_close(net(x).norm(dim=-1), torch.ones(200))
    model = MongeMap(map=EntropicMap(3, "geodesic"))  # not refused, as maps off the sphere are
    assert str(model.cost) == "geodesic"


def test_more_samples_than_a_plan_takes_are_drawn_and_plans_averaged():
    x, y, new = normal(900, 2), bent(normal(900, 2, seed=1)), normal(300, 2, seed=2)
    errors, sizes = [], []
    for draws in (1, 3):
        net = EntropicMap(2, max_samples=100, draws=draws)
        net.start(x, y)
        errors.append(error(net(new), bent(new)))
        sizes.append(len(net.points))
    assert sizes == [100, 300]
    assert len(net.points.unique(dim=0)) == 300  # fresh ones
    assert errors[1] < errors[0]


def of_two_conditions() -> EntropicMap:
    net = EntropicMap(2, num_conditions=3, max_samples=50, draws=2)
    pairs = [StartPair(normal(60 + k, 2), normal(40, 2, seed=k) + 5 * k, torch.tensor(k)) for k in (0, 2)]
    net.start(normal(60, 2), normal(60, 2), pairs=pairs)
    return net


def test_each_condition_has_its_plan():
    net, x, labels = of_two_conditions(), normal(10, 2), torch.tensor([0, 2]).repeat(5)
    images = net(x, labels)
    assert float((images[::2]).mean()) < 2 < 8 < float(images[1::2].mean()) < 12
    torch.testing.assert_close(net(x[::2], labels[::2]), images[::2])
    with pytest.raises(ValueError, match="condition has the label 1, of which there was no training sample"):
        net(x, torch.ones(10, dtype=torch.long))
    with pytest.raises(ValueError, match="this map is conditional: give start"):
        EntropicMap(2, num_conditions=2).start(x, x)
    with pytest.raises(ValueError, match="condition has the label 5, but the map knows 2 conditions"):
        EntropicMap(2, num_conditions=2).start(x, x, pairs=[(x, x, torch.tensor(5))])


def started() -> EntropicMap:
    net = EntropicMap(2, "euclidean")
    net.start(normal(30, 2), normal(20, 2, seed=1))
    return net


@pytest.mark.parametrize("make", [started, of_two_conditions])
def test_it_is_made_again_from_its_arguments_and_its_state(make):
    net, x = make(), normal(10, 2)
    arguments = (x, torch.tensor([0, 2]).repeat(5)) if net.conditional else (x,)
    file = io.BytesIO()
    torch.save({"hparams": net.hparams, "state": net.state_dict()}, file)
    file.seek(0)
    held = torch.load(file, weights_only=True)
    again = EntropicMap(**held["hparams"])
    again.load_state_dict(held["state"])
    for other in (again, copy.deepcopy(net), pickle.loads(pickle.dumps(net)), copy.deepcopy(again)):
        assert torch.equal(other(*arguments), net(*arguments))
        empty = type(net)(**net.hparams)
        empty.load_state_dict(other.state_dict(), assign=True)
        assert torch.equal(empty(*arguments), net(*arguments))
    before = net.state_dict()
    again.start(x + 100, x, pairs=[(x, x + 9, torch.tensor(0))] if net.conditional else None)
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())
    # One that has started takes the state of another, of other sizes.
    other = EntropicMap(**net.hparams)
    other.load_state_dict(EntropicMap(**net.hparams).state_dict())
    assert not bool(other.started)


def test_precision_shapes_and_slopes():
    net, x = started(), normal(6, 2)
    assert net(x[:0]).shape == (0, 2)
    torch.testing.assert_close(net(x.view(2, 3, 2)).view(6, 2), net(x))
    assert net(x.double()).dtype == torch.float64
    torch.testing.assert_close(net(x.double()).float(), net(x), rtol=1e-3, atol=1e-3)
    assert net(x.half()).dtype == torch.float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(net(x), net.float()(x))
    with torch.inference_mode():
        torch.testing.assert_close(net(x), net(x))
    points = x.double().requires_grad_()
    assert torch.autograd.gradcheck(net.double(), (points,), fast_mode=True)


def test_without_a_plan_it_says_so_and_is_the_identity():
    x = normal(4, 2)
    with pytest.warns(UserWarning, match="EntropicMap has no plan yet"):
        assert torch.equal(EntropicMap(2)(x), x)


def test_a_cost_of_ones_own_works_but_has_no_arguments_to_keep():
    net = EntropicMap(2, lambda u, v: (u - v).square().sum(-1), relative_epsilon=0.01)
    squared = EntropicMap(2, epsilon=None, relative_epsilon=0.01)
    x, y = normal(50, 2), normal(50, 2, seed=1)
    for one in (net, squared):
        one.start(x - x.mean(0), y - y.mean(0))
    torch.testing.assert_close(net(x), squared(x), rtol=1e-3, atol=1e-3)
    assert net.hparams is None
    assert squared.hparams["cost"] == "sqeuclidean"


@pytest.mark.parametrize(
    ("options", "error_type", "message"),
    [
        ({"relative_epsilon": 0}, ValueError, "relative_epsilon"),
        ({"epsilon": -1.0}, ValueError, "epsilon"),
        ({"max_samples": 0}, ValueError, "max_samples"),
        ({"draws": 1.5}, TypeError, "draws"),
        ({"image": "median"}, ValueError, "image must be one of gradient, mean"),
        ({"tie_break": -1}, ValueError, "tie_break"),
        ({"num_conditions": 0}, ValueError, "num_conditions"),
        ({"cost": "squared"}, ValueError, "squared"),
    ],
)
def test_wrong_arguments_are_refused(options, error_type, message):
    with pytest.raises(error_type, match=message):
        EntropicMap(2, **options)


def test_samples_it_cannot_take_are_refused_before_anything_changes():
    net, x = EntropicMap(2, "geodesic"), normal(5, 2)
    with pytest.raises(ValueError, match="off the unit sphere"):
        net.start(x, x)
    with pytest.raises(ValueError, match="source has dimension 3"):
        net.start(normal(5, 3), normal(5, 3))
    assert not bool(net.started)
    assert len(net.points) == 0


@pytest.mark.filterwarnings("ignore:MapScores")
def test_a_fit_ends_after_a_step_with_scores_a_checkpoint_and_a_map(tmp_path):
    seed_everything(0, verbose=False)
    x, y = torch.randn(300, 2), bent(torch.randn(250, 2))
    data = SamplesDataModule(x, y, batch_size=64, test_fraction=0.2)
    model = MongeMap(map=EntropicMap(2, relative_epsilon=0.01))
    trainer = quiet(max_epochs=50, enable_checkpointing=True, default_root_dir=tmp_path)
    trainer.fit(model, data)
    assert trainer.global_step == 1
    assert trainer.callback_metrics["lightning_gap/monge/val_energy_distance"].isfinite()
    assert bool(model.map.started)
    assert "lightning_gap/monge/test_loss" in trainer.test(model, data, verbose=False)[0]
    path = trainer.checkpoint_callback.best_model_path
    again = MongeMap.load_from_checkpoint(path)
    assert again.map.hparams == model.map.hparams
    assert torch.equal(again.transport(x), model.transport(x))
    # Resumed, it has its plan and ends at once.
    resumed = MongeMap(map=EntropicMap(2, relative_epsilon=0.01))
    trainer = quiet(max_epochs=2, enable_checkpointing=True, default_root_dir=tmp_path)
    trainer.fit(resumed, data, ckpt_path=path, weights_only=True)
    assert torch.equal(resumed.transport(x), model.transport(x))


@pytest.mark.filterwarnings("ignore:MapScores")
def test_a_fit_by_conditions_solves_a_plan_for_each():
    x = normal(120, 2)
    y = torch.cat([normal(60, 2, seed=1) + 8, normal(60, 2, seed=2) - 8])
    labels = ["a"] * 60 + ["b"] * 60
    data = SamplesDataModule(x, y, conditions=(labels, labels), batch_size=20)
    model = MongeMap(map=EntropicMap(2, num_conditions=2))
    quiet(max_epochs=3).fit(model, data)
    means = [float(model.transport(x[:20], name).mean()) for name in ("a", "b")]
    assert means[0] > 6
    assert means[1] < -6
