"""Multiplicative gradient noise: its covariance, its gradient against a weighted loss, resume, refusals."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regime_runs import Regression, SaveAt, loader, run
from torch import nn

from lightning_gap.regime import LargeBatchRegime, noise_variance, sample_weights
from lightning_gap.regime.sample_noise import SampleNoise

pytestmark = pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*")


def test_the_weights_have_their_mean_and_variance():
    weights = torch.stack([sample_weights(1000, 3.0, seed=(0, 0, draw)) for draw in range(200)])
    assert weights.mean().item() == pytest.approx(1, abs=0.02)
    assert weights.var().item() == pytest.approx(3, rel=0.02)
    assert abs(torch.corrcoef(weights[:2])[0, 1].item()) < 0.1
    assert not torch.equal(sample_weights(5, 1.0, seed=(0, 0, 1)), sample_weights(5, 1.0, seed=(0, 1, 1)))


def covariances(ratio, *, small=4, draws=100_000, centre=0.0):
    """Of the mean gradient of a least-squares problem, by the layer's own hook: the small and the noisy large batch."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(200, 3, generator=generator) * torch.tensor([1.0, 0.5, 2.0])
    samples = samples - samples.mean(0) + centre  # gradients of <w, x_n>: mean `centre`
    covariances = []
    for batch, variance in ((small, 0.0), (small * ratio, noise_variance(ratio))):
        gradients = []
        layer = nn.Identity()
        noise = SampleNoise(layer, variance, seed=0, rank=0)
        for _ in range(20):
            weights = torch.zeros(draws // 20, 3, requires_grad=True)
            rows = torch.randint(200, (draws // 20, batch), generator=generator)
            # One output row a sample: the draws' batches stacked.
            outputs = layer((samples[rows] * weights[:, None]).sum(2).flatten())
            (outputs.view(-1, batch).mean(1)).sum().backward()
            gradients.append(weights.grad)
        noise.remove()
        covariances.append(torch.cat(gradients).double().T.cov())
    return covariances


@pytest.mark.parametrize("ratio", [2, 8])
def test_the_covariance_is_the_small_batchs(ratio):
    small, noisy = covariances(ratio)
    assert (noisy - small).norm() < 0.03 * small.norm()
    for i in range(3):
        assert noisy[i, i].item() == pytest.approx(small[i, i].item(), rel=0.03)


def test_a_mean_gradient_adds_its_square():
    # Independent weights have the small batch's second moments, so its covariance where gradients have mean 0. A mean m
    # adds m m^T (1/B_S - 1/B_L).
    small, noisy = covariances(4, centre=1.0)
    excess = torch.ones(3, 3, dtype=torch.float64) * (1 / 4 - 1 / 16)
    assert (noisy - small - excess).norm() < 0.03 * small.norm()


class Nets:
    plain = staticmethod(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)))

    class Outputs(nn.Module):
        """A dictionary of two outputs."""

        def __init__(self):
            super().__init__()
            self.net = Nets.plain()

        def forward(self, x):
            return {"y": self.net(x), "parts": (self.net[0](x), 3)}


@pytest.mark.parametrize("net", [Nets.plain, Nets.Outputs])
def test_the_gradient_is_that_of_a_weighted_loss(net):
    torch.manual_seed(0)
    net, x, y = net(), torch.randn(6, 4), torch.randn(6, 1)

    def losses():
        out = net(x)
        if isinstance(out, dict):
            return (out["y"] - y).square().flatten() + out["parts"][0].square().sum(1)
        return (out - y).square().flatten()

    (sample_weights(6, 3.0, seed=(7, 2, 1)) * losses()).mean().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    noise = SampleNoise(net, 3.0, seed=7, rank=2)
    loss = losses().mean()
    noise.check(net, loss)
    loss.backward()
    for p, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    net.eval()
    losses().mean().backward()
    assert noise.draws == 1


# --------------------------------------------------------------------------------------------------------- in a run


class Watched(Regression):
    def train_dataloader(self):
        return loader(16)


def regime():
    return LargeBatchRegime(7, lr_rule="none", gradient_noise=True)


class Losses(Callback):
    def __init__(self):
        self.first = None

    def on_before_backward(self, trainer, pl_module, loss):
        self.first = loss.item() if self.first is None else self.first


def test_noise_changes_gradients_and_nothing_else():
    runs = {}
    for name, callback in (("noise", regime()), ("none", LargeBatchRegime(7, lr_rule="none"))):
        module, losses = Watched(), Losses()
        trainer, trace = run(module, None, callback, losses)
        runs[name] = (trainer.global_step, trace.rates, losses.first, torch.rand(1), module.layer.weight.detach())
    assert runs["noise"][:4] == runs["none"][:4]
    assert not torch.equal(runs["noise"][4], runs["none"][4])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_noise_resumes_bit_for_bit(accumulate, tmp_path):
    whole, save = Watched(), SaveAt(tmp_path)
    run(whole, None, regime(), save, accumulate_grad_batches=accumulate)
    for step in save.saved[::3]:
        part = Watched()
        torch.manual_seed(99)
        run(part, None, regime(), ckpt_path=tmp_path / f"{step}.ckpt", accumulate_grad_batches=accumulate)
        assert torch.equal(whole.layer.weight, part.layer.weight)


class Penalty(Regression):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.1 * self.layer.weight.square().sum()


class Twice(Regression):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + super().training_step(batch, batch_idx)


class Normalized(Regression):
    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Headed(Regression):
    """Has a head after its layer."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.head(self.layer(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Pooled(Regression):
    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0), Mean())

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean()


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        (Penalty, True, r"reaches layer.weight other than through the output.*weight_decay"),
        (Twice, True, "ran 2 times in a training step"),
        (Normalized, True, "BatchNorm makes a sample's gradient depend"),
        (Headed, "layer", r"reaches head.bias, head.weight other than"),
        (Pooled, True, r"must have one row a sample, and has the shapes \[\(\)\]"),
    ],
)
def test_what_cannot_be_weighted_is_refused(module, name, message):
    trainer_module = module()
    before = trainer_module.state_dict()
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        run(trainer_module, loader(30), LargeBatchRegime(4, lr_rule="none", gradient_noise=name))
    assert before.keys() == trainer_module.state_dict().keys()


def test_the_last_module_may_be_named():
    run(module := Headed(), loader(30), LargeBatchRegime(4, lr_rule="none", gradient_noise="head"), max_epochs=1)
    assert not module.head._forward_hooks


def test_a_compiled_network_is_weighted():
    compiled, plain = Watched(), Watched()
    compiled.layer = torch.compile(compiled.layer, backend="eager")
    run(compiled, None, regime(), max_epochs=1)
    run(plain, None, regime(), max_epochs=1)
    assert torch.equal(compiled.layer.weight, plain.layer.weight)
    with pytest.raises(MisconfigurationException, match="Compile the network inside"):
        run(torch.compile(Watched(), backend="eager"), None, regime())


def test_weights_are_drawn_on_the_cpu_whatever_the_default_device():
    expected = sample_weights(5, 3.0, seed=(0, 1))
    with torch.device("meta"):
        assert torch.equal(sample_weights(5, 3.0, seed=(0, 1)), expected)
