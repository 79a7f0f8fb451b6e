"""The noise scale of a run on one device, of examples and of ghosts: known ones, those of micro-batches, unseen."""

import copy

import pytest
import torch
from example_models import Characters, cnn, mlp
from lightning.pytorch.plugins import MixedPrecision
from noise_scale_models import SAMPLES, Classifier, samples, targets
from regime_runs import trainer_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gap import GhostBatchNorm, GradientNoiseScale
from lightning_gap.ghost import GhostBatchNorm1d, GhostBatchNorm2d, ghost_slices
from lightning_gap.regime import ExampleGradients
from lightning_gap.regime.noise_sources.sources import ghosts_of

pytestmark = pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*")


class Layer(Classifier):
    """Loss |w - x|^2 / 2 by a layer: a sample's gradient is w - x."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 3, bias=False)
        with torch.no_grad():
            self.net.weight.copy_(torch.linspace(-1, 1, 3)[:, None])

    def training_step(self, batch, batch_idx):
        return (self.net(torch.ones_like(batch[0][:, :1])) - batch[0]).square().sum(1).mean() / 2

    def train_dataloader(self):
        return DataLoader(TensorDataset(targets()), batch_size=32, shuffle=True)


def fit(module, data=None, *callbacks, seed=0, **options):
    torch.manual_seed(seed)
    trainer = trainer_of(*callbacks, **{"max_epochs": 1, **options})
    trainer.fit(module, data)
    return trainer


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("source", ["auto", "examples"])
def test_a_known_noise_scale_is_found(accumulate, scaled, source):
    scale = GradientNoiseScale(every_n_updates=1, source=source)
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))] if scaled else []
    trainer = fit(Layer(), None, scale, max_epochs=16, accumulate_grad_batches=accumulate, plugins=plugins)
    assert scale.estimate.measurements == trainer.global_step == 16 * SAMPLES // 32 // accumulate
    x, w = targets(), torch.linspace(-1, 1, 3)
    count = scale.estimate.measurements
    found = scale.estimate.total_variance / count, scale.estimate.total_square / count
    # Micro-batches find the variance with far more noise than examples do.
    tolerance = 0.03 if source == "examples" or accumulate == 1 else 0.3
    assert found[0] == pytest.approx(x.var(0).sum().item(), rel=tolerance)
    assert found[1] == pytest.approx((w - x.mean(0)).square().sum().item(), rel=0.05)


def test_incomplete_batches_and_windows_are_not_measured_wrongly():
    """Three whole batches of four, of which windows of two and one, and an incomplete one."""

    class Short(Layer):
        def train_dataloader(self):
            return DataLoader(TensorDataset(targets(50)), batch_size=16)

    scale = GradientNoiseScale(every_n_updates=1, source="examples")
    trainer = fit(Short(), None, scale, max_epochs=2)
    assert (trainer.global_step, scale.estimate.measurements) == (8, 6)
    x, w = targets(50)[:48], torch.linspace(-1, 1, 3)
    gradients = (w - x).unflatten(0, (3, 16))
    variance = (gradients - gradients.mean(1, keepdim=True)).square().sum((1, 2)) / 15
    assert scale.estimate.total_variance == pytest.approx(2 * variance.sum().item(), rel=1e-5)


class Images(Classifier):
    """A network, one with dropout too, that trains."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def images(make, count=48):
    generator = torch.Generator().manual_seed(3)
    if make is Characters:
        x = torch.randint(11, (count, 5), generator=generator)
        return TensorDataset(x, x)
    return TensorDataset(torch.randn(count, 3, 8, 8, generator=generator), torch.arange(count) % 5)


def ghostly():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Flatten(),
        nn.Linear(216, 8), nn.BatchNorm1d(8), nn.Linear(8, 5),
    )  # fmt: skip


def dense():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 12), mlp(nn.LayerNorm), nn.Dropout(0.2))


@pytest.mark.parametrize(
    ("make", "source"), [(dense, "examples"), (cnn, "examples"), (Characters, "examples"), (ghostly, "ghosts")]
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_is_the_same_bit_for_bit(make, source, accumulate):
    torch.manual_seed(0)
    net = make()
    ghosts = [GhostBatchNorm(4)] if source == "ghosts" else []
    outcomes = []
    for extra in ([], [scale := GradientNoiseScale(every_n_updates=2, source=source)]):
        module = Images(copy.deepcopy(net))
        data = DataLoader(images(make), batch_size=8, shuffle=True)
        fit(module, data, *extra, *ghosts, max_epochs=2, accumulate_grad_batches=accumulate)
        outcomes.append(([*module.state_dict().values()], torch.get_rng_state()))
        assert not any(layer._forward_hooks for layer in module.modules())
    assert scale.estimate.measurements == 6 // accumulate
    for plain, seen in zip(outcomes[0][0], outcomes[1][0], strict=True):
        assert torch.equal(plain, seen)
    assert torch.equal(outcomes[0][1], outcomes[1][1])


@pytest.mark.parametrize("grouping", ["contiguous", "strided"])
@pytest.mark.parametrize("batch", [16, 17, 18])
def test_a_ghosts_gradient_is_that_of_its_own_batch(grouping, batch):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), GhostBatchNorm2d(6, ghost_batch_size=4, grouping=grouping), nn.ReLU(),
        nn.Flatten(), nn.Linear(24, 8), GhostBatchNorm1d(8, ghost_batch_size=4, grouping=grouping), nn.Linear(8, 5),
    ).double()  # fmt: skip
    if batch == 17:  # where layers of one position have another last ghost than those of several
        net[1] = nn.Identity()
    with torch.no_grad():
        net[5].weight[2] = 0.0
    x, y = torch.randn(batch, 3, 4, 4).double(), torch.arange(batch) % 5
    layers = {name: layer for name, layer in net.named_modules() if hasattr(layer, "ghosts_in")}
    ghosts = ghosts_of(layers, batch)
    assert ghosts == [slice(*s.indices(batch)) for s in ghost_slices(batch, 4, grouping=grouping)]
    gradients = ExampleGradients()
    gradients.listen(net, examples=batch, groups=ghosts)
    nn.functional.cross_entropy(net(x), y).backward()
    found = gradients.norms()
    assert gradients.unmeasured == {}
    expected = []
    for ghost in sorted(ghosts, key=lambda s: len(range(batch)[s]) != len(range(batch)[ghosts[0]])):
        net.zero_grad()
        nn.functional.cross_entropy(net(x[ghost]), y[ghost]).backward()  # smaller than a ghost, and so one
        expected.append(sum(parameter.grad.square().sum() for parameter in net.parameters()))
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=0)


def measured(batch, source, *layers, callbacks=(), max_examples=32, **options):
    scale = GradientNoiseScale(every_n_updates=1, source=source, max_examples=max_examples)
    fit(Classifier(*layers), samples(batch), scale, *callbacks, seed=1, max_epochs=4, **options)
    return scale.estimate


def test_examples_find_what_micro_batches_find():
    batches = measured(4, "accumulation", accumulate_grad_batches=16)
    for max_examples in (None, 8):
        examples = measured(64, "examples", max_examples=max_examples)
        assert examples.critical_batch_size == pytest.approx(batches.critical_batch_size, rel=0.2)


def test_ghosts_find_what_micro_batches_of_their_size_find():
    ghosts = measured(64, "auto", nn.BatchNorm1d(16), callbacks=[GhostBatchNorm(4)])
    strided = measured(64, "ghosts", GhostBatchNorm1d(16, ghost_batch_size=4, grouping="strided"))
    batches = measured(4, "auto", nn.BatchNorm1d(16), accumulate_grad_batches=16)
    for found in (ghosts, strided):
        assert found.critical_batch_size == pytest.approx(batches.critical_batch_size, rel=0.2)


def test_what_is_left_out_is_named_once_and_in_the_verdict(capsys):
    class Scaled(Classifier):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]) * self.scale, batch[1])

    scale = GradientNoiseScale(every_n_updates=1)
    with pytest.warns(UserWarning, match=r"98.9 % of the weights, without scale \(no layer") as caught:
        fit(Scaled(), samples(64, 256), scale)
    assert sum("98.9 %" in str(warning.message) for warning in caught) == 1
    assert "98.9 % of the weights" in " ".join(capsys.readouterr().out.split())
    assert scale.estimate.measurements == 4


def test_a_lazy_model_is_measured_from_its_second_update_on():
    class Lazy(Classifier):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(2))

    scale = GradientNoiseScale(every_n_updates=1)
    fit(Lazy(), samples(64, 256), scale)
    assert scale.estimate.measurements == 3


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
def test_layers_that_change_in_training_end_the_measurements():
    class Thawed(Classifier):
        def on_train_epoch_start(self):
            self.net[1].train(self.current_epoch > 0)

    module, scale = Thawed(nn.BatchNorm1d(16).eval()), GradientNoiseScale(every_n_updates=1)
    with pytest.warns(UserWarning, match="does not measure any more: net.1 normalizes over the batch"):
        fit(module, samples(64, 256), scale, max_epochs=2)
    assert scale.estimate.measurements == 4
