import math

import pytest
import torch
from torch import nn

from lightning_gap.diffusion import estimate_alpha, norms_and_biases


class RandomPotential(nn.Module):
    """A Gaussian field with E(L(w) − L(0))² ~ ‖w‖^α, by plane waves, weaker the higher their frequency.

    Beyond α = 2 increments of first order do not exist: the gradient at w_0 = 0 is taken out, and the second-order
    ones grow as ‖w‖^α. α = 2 is a random plane.
    """

    def __init__(self, alpha, seed, size=1000, waves=2000):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.zeros(size, dtype=torch.float64))
        directions = torch.randn(waves, size, generator=generator, dtype=torch.float64)
        frequencies = torch.logspace(-3, 4, waves, dtype=torch.float64)
        self.alpha, self.amplitudes = alpha, frequencies ** (-alpha / 2)
        self.waves = frequencies[:, None] * directions
        self.phases = 2 * math.pi * torch.rand(waves, generator=generator, dtype=torch.float64)
        self.plane = directions[0]

    def loss(self):
        if self.alpha == 2:
            return self.plane @ self.weight
        angle = self.waves @ self.weight
        wave = (angle + self.phases).cos() - self.phases.cos()
        if self.alpha > 2:
            wave = wave + angle * self.phases.sin()
        return self.amplitudes @ wave


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 3))
        self.layers[4].eval()

    def forward(self, x):
        return self.layers(x)


X, Y = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3


def cross_entropy(net):
    return nn.functional.cross_entropy(net(X).float(), Y)


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_alpha_of_a_random_potential(alpha, seed):
    fit = estimate_alpha(RandomPotential(alpha, seed), RandomPotential.loss, radius=2.0, seed=seed)
    assert fit.alpha == pytest.approx(alpha, abs=0.15)
    assert fit.gamma == fit.alpha / 2
    assert fit.alpha_interval[0] < fit.alpha < fit.alpha_interval[1]
    assert fit.r2 > 0.9
    assert len(fit.losses) == 1000


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_interval_covers_alpha(alpha):
    fits = [
        estimate_alpha(RandomPotential(alpha, seed), RandomPotential.loss, radius=2.0, seed=seed) for seed in range(30)
    ]
    assert [fit.alpha for fit in fits] == pytest.approx([alpha] * 30, abs=0.2)
    assert sum(fit.alpha_interval[0] <= alpha <= fit.alpha_interval[1] for fit in fits) >= 27


def test_spread_equals_a_plain_loop():
    """Standard deviations about each bin's own line, by numpy.polyfit one bin at a time."""
    import numpy as np

    fit = estimate_alpha(nn.Linear(9, 1), lambda m: m.weight.sum() + 0.3 * m.weight.norm() ** 2, radius=2.0, bins=5)
    z, losses = np.array(fit.distances), np.array(fit.losses)
    for b in range(5):
        inside = (z >= 0.4 * b) & (z < 0.4 * (b + 1))
        line = np.polyval(np.polyfit(z[inside], losses[inside], 1), z[inside])
        expected = math.sqrt(((losses[inside] - line) ** 2).sum() / (inside.sum() - 2))
        assert fit.std[b] == pytest.approx(expected, rel=1e-6)
        mean_power = (z[inside] ** (2 * fit.gamma)).mean() ** (0.5 / fit.gamma)
        assert fit.radii[b] == pytest.approx(mean_power, rel=1e-3)


def test_rms_holds_the_growth_of_the_mean():
    bowl = lambda layer: (layer.weight - start).square().sum() + 2e-2 * layer.weight.sum()  # noqa: E731
    layer = nn.Linear(40, 1, bias=False)
    start = layer.weight.detach().clone()
    assert estimate_alpha(layer, bowl, radius=1.0, samples=300, statistic="rms").alpha == pytest.approx(4, abs=0.1)
    assert estimate_alpha(layer, bowl, radius=1.0, samples=300).alpha == pytest.approx(2, abs=0.25)


def everything(net):
    return {
        "state": {name: tensor.clone() for name, tensor in net.state_dict().items()},
        "gradients": [None if p.grad is None else p.grad.clone() for p in net.parameters()],
        "modes": [part.training for part in net.modules()],
        "rng": torch.get_rng_state(),
    }


@pytest.mark.parametrize("batch_norm", ["batch", "running"])
def test_module_and_generators_are_as_before(batch_norm):
    net = Net()
    cross_entropy(net).backward()
    before, parameters = everything(net), list(net.parameters())
    noisy = lambda net: cross_entropy(net) + 1e-6 * torch.rand(())  # noqa: E731
    fit = estimate_alpha(net, noisy, radius=1.0, samples=100, bins=5, batch_norm=batch_norm)
    torch.testing.assert_close(everything(net), before, rtol=0, atol=0)
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert fit.distances == estimate_alpha(net, noisy, radius=1.0, samples=100, bins=5).distances


def test_module_is_as_before_where_the_loss_raises():
    net, calls = Net(), []

    def failing(net):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("no data")
        return cross_entropy(net)

    before = everything(net)
    with pytest.raises(RuntimeError, match="no data"):
        estimate_alpha(net, failing, radius=1.0)
    torch.testing.assert_close(everything(net), before, rtol=0, atol=0)


def test_batch_norm_uses_the_statistics_asked_for():
    seen = []

    def loss(net):
        seen.append([part.training for part in net.layers])
        return cross_entropy(net)

    for batch_norm in ("batch", "running"):
        estimate_alpha(Net(), loss, radius=1.0, samples=60, bins=5, batch_norm=batch_norm)
    assert seen[0] == [False, True, False, False, False]
    assert seen[-1] == [False] * 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_autocast(dtype):
    net = nn.Linear(50, 1, bias=False).to(dtype)
    fit = estimate_alpha(net, lambda net: net.weight.sum().double(), radius=3.0)
    assert fit.alpha == pytest.approx(2, abs=0.15)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert math.isfinite(estimate_alpha(Net(), cross_entropy, radius=3.0, samples=100, bins=5).alpha)


def test_excluded_and_frozen_parameters_stay():
    net = Net()
    net.layers[4].weight.requires_grad_(False)
    kept = {name: p.clone() for name, p in net.named_parameters()}
    moved = set()

    def loss(net):
        moved.update(name for name, p in net.named_parameters() if not p.equal(kept[name]))
        return cross_entropy(net)

    estimate_alpha(net, loss, radius=1.0, samples=60, bins=5, exclude=norms_and_biases)
    assert moved == {"layers.0.weight"}


def test_distances_are_those_of_the_weights():
    net, lengths = nn.Linear(30, 4), []
    start = torch.cat([p.detach().flatten() for p in net.parameters()])

    def loss(net):
        now = torch.cat([p.flatten() for p in net.parameters()])
        lengths.append(float((now - start).norm()))
        return now.sum()

    fit = estimate_alpha(net, loss, radius=2.0, samples=200)
    assert lengths[0] == 0
    assert lengths[1:] == pytest.approx(fit.distances, rel=1e-5)
    assert 0 < min(fit.distances) < 0.1 < 1.9 < max(fit.distances) < 2


def test_plot(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    figure, ax = estimate_alpha(nn.Linear(9, 1), lambda m: m.weight.sum(), radius=2.0, samples=100, bins=5).plot()
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert len(ax.lines) == 2
    matplotlib.pyplot.close(figure)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"radius": 0.0}, "radius must be a positive"),
        ({"samples": 3}, "samples must be at least 12"),
        ({"bins": 2}, "bins must be at least 3"),
        ({"samples": 12, "bins": 12}, "draw more"),
        ({"statistic": "var"}, "statistic must be"),
        ({"batch_norm": "eval"}, "batch_norm must be"),
        ({"exclude": "("}, "exclude='\\(' is not a regular expression"),
        ({"exclude": "."}, "exclude less"),
        ({"confidence": 1.0}, "confidence must lie"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        estimate_alpha(nn.Linear(3, 1), lambda m: m.weight.sum(), **({"radius": 1.0} | arguments))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m: m.weight, "scalar tensor, got Parameter"),
        (lambda m: 1.0, "scalar tensor, got float"),
        (lambda m: m.weight.sum() / 0, "loss is -?inf at distance 0: take a smaller radius"),
        (lambda m: torch.ones(()), "loss does not change"),
    ],
)
def test_bad_losses_are_refused(loss, message):
    with pytest.raises(ValueError, match=message):
        estimate_alpha(nn.Linear(3, 1), loss, radius=1.0)


def test_sharded_parameters_are_refused(sharded_layer):
    with pytest.raises(ValueError, match="probe a copy that is not sharded"):
        estimate_alpha(sharded_layer, lambda m: m.weight.sum(), radius=1.0)
