"""Gradients of convex potentials: they are optimal whatever their weights, and start near what they are told to."""

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch.autograd.functional import jacobian

from lightning_gap import MongeMap, SamplesDataModule, monge_gap
from lightning_gap.monge import BrenierMap, gaussian_map


def random_map(dim, hidden=(8, 6, 5), **options):
    seed_everything(0, verbose=False)
    net = BrenierMap(dim, hidden, **options).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return net


def quiet(**options):
    return Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, **options
    )  # fmt: skip


@pytest.mark.parametrize("hidden", [(7,), (8, 5), (8, 6, 5)])
def test_the_jacobian_is_symmetric_and_positive(hidden):
    net = random_map(4, hidden)
    for x in torch.randn(5, 4, dtype=torch.float64):
        J = jacobian(lambda point: net(point[None])[0], x)
        torch.testing.assert_close(J, J.mT)
        assert torch.linalg.eigvalsh(J).amin() > 0


def test_it_is_the_gradient_of_the_potential_that_is_promised():
    net = random_map(3)

    def potential(x):
        skips = ((x @ net.squares.T) ** 2 + x @ net.slopes.T + net.biases).split(net.widths)
        z = torch.nn.functional.softplus(skips[0])
        for raw, skip in zip(net.mixing, skips[1:], strict=True):
            z = torch.nn.functional.softplus(torch.nn.functional.softplus(raw) @ z + skip)
        top = torch.nn.functional.softplus(net.last) @ z
        return top + torch.nn.functional.softplus(net.curvature) * x.square().sum() / 2 + net.offset @ x

    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(potential(x), x)
    torch.testing.assert_close(net(x[None])[0], gradient)


def test_its_exact_gap_is_zero_and_a_perceptrons_is_not():
    x = torch.randn(300, 5, dtype=torch.float64)
    net = random_map(5)
    assert abs(float(monge_gap(x, net(x).detach(), solver="exact"))) < 1e-9
    assert float(monge_gap(x, net(x).detach().flip(-1), solver="exact")) > 0.1


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_needs_no_gradients(context):
    net, x = random_map(3), torch.randn(6, 3, dtype=torch.float64)
    with context():
        images = net(x)
    torch.testing.assert_close(images, net(x))


def test_the_gaussian_start_is_near_the_gaussian_map():
    seed_everything(1, verbose=False)
    x, y = torch.randn(1000, 3), torch.randn(1000, 3) @ torch.randn(3, 3) + torch.tensor([1.0, -2.0, 0.0])
    net = BrenierMap(3, (16, 16), plan_steps=300)
    net.start(x, y)
    A, b = gaussian_map(x, y)
    error = (net(x).detach() - (x.double() @ A + b)).square().sum(1).mean()
    assert float(error / y.var(0).sum()) < 0.02


@pytest.mark.parametrize(("offset", "scale"), [(1e3, 1.0), (0.0, 1e-3), (-5.0, 200.0)])
def test_the_start_knows_no_units(offset, scale):
    seed_everything(1, verbose=False)
    x = offset + scale * torch.randn(400, 2)
    net = BrenierMap(2, (16,), plan_steps=300)
    net.start(x, 3 * x + 7)
    error = (net(x).detach() - (3 * x + 7)).square().sum(1).mean()
    assert float(error / (3 * x).var(0).sum()) < 0.02


def test_constant_samples_are_allowed():
    net, x = BrenierMap(2, (8,)), torch.randn(50, 1) * torch.tensor([1.0, 0.0])
    net.start(x, torch.full((20, 2), 4.0))
    assert torch.isfinite(net(x)).all()
    assert float((net(x).detach() - 4).abs().mean()) < 0.2


def test_the_plan_start_sees_what_the_gaussian_map_cannot():
    seed_everything(2, verbose=False)
    x, fresh = torch.randn(400, 2), torch.randn(400, 2)

    def true_map(points):  # the gradient of a convex function: two clusters from one
        return points + 2 * torch.tanh(4 * points)

    y = true_map(torch.randn(400, 2))
    errors = {}
    for start in ("gaussian", "plan"):
        net = BrenierMap(2, (16, 16), start=start, plan_steps=250)
        net.start(x, y)
        errors[start] = float((net(fresh).detach() - true_map(fresh)).square().sum(1).mean())
    assert errors["plan"] < errors["gaussian"] / 3


def test_a_start_happens_once_and_leaves_random_numbers_and_gradients_alone():
    net, x = BrenierMap(2, (8,)), torch.randn(50, 2)
    before = torch.get_rng_state()
    net.start(x, 3 * x)
    assert torch.equal(before, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in net.parameters())
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    net.start(x, 5 * x + 1)
    for name, value in net.state_dict().items():
        assert torch.equal(value, weights[name])


def test_the_identity_start_leaves_the_map_near_the_identity():
    net, x = BrenierMap(3, start="identity"), torch.randn(200, 3)
    before = net(x)
    net.start(x, x + 9)
    assert torch.equal(net(x), before)
    assert float((before - x).detach().square().sum(1).mean()) < 0.1


def test_more_samples_than_the_plan_takes_are_drawn_at_random():
    seed_everything(3, verbose=False)
    x = torch.cat([torch.randn(500, 2), torch.randn(500, 2) + 8])  # its first rows say nothing of the last
    net = BrenierMap(2, (16,), start="plan", plan_samples=100, plan_steps=200)
    net.start(x, x + 1)
    assert float((net(x).detach() - x - 1).square().sum(1).mean()) < 1.0


def test_a_checkpoint_makes_it_again(tmp_path):
    x = torch.randn(64, 2)
    model = MongeMap(map=BrenierMap(2, (8, 8), start="plan", plan_steps=20), gap_weight=0)
    trainer = quiet(max_steps=3, enable_checkpointing=False, limit_val_batches=0, num_sanity_val_steps=0)
    trainer.fit(model, SamplesDataModule(x, 2 * x, batch_size=32))
    trainer.save_checkpoint(tmp_path / "map.ckpt")
    again = MongeMap.load_from_checkpoint(tmp_path / "map.ckpt")
    assert again.map.hparams == model.map.hparams
    assert torch.equal(again.transport(x), model.transport(x))
    assert bool(again.map.started)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": ()}, "at least one hidden layer"),
        ({"start": "mean"}, "start must be one of"),
        ({"plan_relative_epsilon": 0.0}, "plan_relative_epsilon"),
        ({"plan_steps": 0}, "plan_steps"),
        ({"plan_samples": 0}, "plan_samples"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BrenierMap(2, **{"hidden": (8,), **options})


def test_samples_of_another_dimension_are_refused():
    net = BrenierMap(2, (8,))
    with pytest.raises(ValueError, match="dimension 3"):
        net(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="dimension 3"):
        net.start(torch.zeros(4, 3), torch.zeros(4, 3))
