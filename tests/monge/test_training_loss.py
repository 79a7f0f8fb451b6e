"""What MongeMap trains by: schedules, reference samples, conditions, unbalanced transport, one's own losses."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from monge_runs import Metrics, fit_batch, gaussians, small, trainer
from torch import nn
from torch.optim import SGD, Adam

from lightning_gap import MongeMap, SamplesDataModule, monge_gap, sinkhorn_divergence
from lightning_gap.monge import (
    AffineRepresentation,
    Anneal,
    ConditionalMap,
    StructuredMap,
    UnpairedBatch,
    energy_distance,
)

STILL = partial(SGD, lr=0.0)


def terms(model: MongeMap, batch: object, **options) -> dict[str, float]:
    """Return what one step without a change of the weights logs."""
    watch = Metrics()
    fit_batch(model, batch, callbacks=[watch], **options)
    return watch.train[-1]


def test_the_weight_of_the_gap_follows_its_schedule():
    watch = Metrics()
    model = small(gap_weight=Anneal(4.0, 1.0, updates=2), optimizer=STILL)
    fit_batch(model, gaussians(20), callbacks=[watch], max_epochs=4)
    assert [step["train_gap_weight"] for step in watch.train] == pytest.approx([4, 2, 1, 1])
    for step in watch.train:
        total = step["train_sinkhorn_divergence"] + step["train_gap_weight"] * step["train_monge_gap"]
        assert step["train_loss"] == pytest.approx(total, rel=1e-5)


def test_epsilons_are_annealed():
    source, target = gaussians(20)
    watch = Metrics()
    model = small(epsilon_factor=Anneal(8.0, 1.0, updates=3), optimizer=STILL, fitting_epsilon=0.5, gap_epsilon=0.1)
    fit_batch(model, (source, target), callbacks=[watch], max_epochs=4)
    for step, factor in zip(watch.train, (8, 4, 2, 1), strict=True):
        assert step["train_epsilon_factor"] == pytest.approx(factor)
        divergence = sinkhorn_divergence(source, target, epsilon=0.5 * factor)
        assert step["train_sinkhorn_divergence"] == pytest.approx(float(divergence), rel=1e-3)
        assert step["train_monge_gap"] == pytest.approx(
            float(monge_gap(source, source, epsilon=0.1 * factor)), rel=1e-3
        )


def test_the_energy_distance_is_a_fitting_loss():
    source, target = gaussians(20)
    step = terms(small(fitting_loss="energy", optimizer=STILL), (source, target))
    assert step["train_energy_distance"] == pytest.approx(float(energy_distance(source, target)), rel=1e-5)
    assert "train_sinkhorn_divergence" not in step


def mean_distance(mapped, target):
    return (mapped.mean(0) - target.mean(0)).square().sum()


def test_a_function_is_a_fitting_loss():
    source, target = gaussians(20)
    step = terms(small(fitting_loss=mean_distance, optimizer=STILL), (source, target))
    assert step["train_fitting_loss"] == pytest.approx(float(mean_distance(source, target)), rel=1e-5)
    run = trainer()
    run.validate(small(fitting_loss=mean_distance), SamplesDataModule(source, target, batch_size=4), verbose=False)
    got = {name.rsplit("/", 1)[1]: float(value) for name, value in run.callback_metrics.items()}
    assert got["val_loss"] == pytest.approx(got["val_fitting_loss"] + got["val_monge_gap"], rel=1e-5)


@pytest.mark.parametrize(("gap_on", "n"), [("reference", 20), ("both", 40)])
def test_the_gap_is_measured_on_reference_samples(gap_on, n):
    source, target = gaussians(20)
    reference = 3 * torch.randn(50, 2, generator=torch.Generator().manual_seed(3))
    model = small(gap_reference=reference.numpy(), gap_on=gap_on, optimizer=STILL, gap_epsilon=0.1)
    gap = terms(model, (source, target))["train_monge_gap"]
    assert gap >= 0.1 * math.log(n) * (1 - 1e-5)  # the map is the identity
    assert gap == pytest.approx(0.1 * math.log(n), rel=0.2)


def test_a_gap_on_a_wide_reference_keeps_the_map_optimal_there():
    """A map that swaps two clouds is optimal on each of them, and not on both."""
    x = gaussians(20)[0] * 0.1
    swap = nn.Linear(2, 2)
    with torch.no_grad():
        swap.weight.copy_(-torch.eye(2))
        swap.bias.zero_()
    left, right = x - 3, x + 3
    options = {"optimizer": STILL, "gap_epsilon": 0.3}
    alone = terms(MongeMap(map=swap, **options), (left, right))["train_monge_gap"]
    wide = terms(MongeMap(map=swap, gap_reference=torch.cat([left, right]), **options), (left, right))[
        "train_monge_gap"
    ]
    assert alone < 2
    assert wide > 10


def test_outliers_are_left_aside():
    source, target = gaussians(40)
    dirty = torch.cat([source, source[:4] + 100])
    options = {"optimizer": STILL, "fitting_epsilon": 0.5, "gap_epsilon": 0.1}
    clean = terms(small(**options), (source, target))["train_sinkhorn_divergence"]
    fooled = terms(small(**options), (dirty, target))["train_sinkhorn_divergence"]
    robust = terms(small(rho=200.0, reweight=True, **options), (dirty, target))["train_sinkhorn_divergence"]
    assert robust == pytest.approx(clean, rel=0.05)
    assert fooled > 10 * clean


def conditional_batch(n: int = 24) -> UnpairedBatch:
    source = torch.stack([gaussians(n)[0]] * 2)
    shifts = torch.tensor([[2.0, 0.0], [0.0, -3.0]])
    return UnpairedBatch(source, source + shifts[:, None], condition=torch.tensor([0, 1]))


def test_one_network_learns_a_map_for_each_condition():
    torch.manual_seed(0)
    network = ConditionalMap(2, num_conditions=2, hidden=(32,))
    model = MongeMap(map=network, optimizer=partial(Adam, lr=0.05), gap_weight=0.1, condition_names=["left", "right"])
    batch = conditional_batch()
    fit_batch(model, batch, max_epochs=60)
    x = batch.source[0]
    for name, label in (("left", 0), ("right", 1)):
        torch.testing.assert_close(model.transport(x, name), batch.target[label], atol=0.5, rtol=0)
        assert torch.equal(model.transport(x, name), model.transport(x, torch.full((len(x),), label)))
    mixed = model.transport(x, ["left", "right"] * (len(x) // 2))
    assert torch.allclose(mixed[0], model.transport(x, "left")[0])
    assert torch.allclose(mixed[1], model.transport(x, "right")[1])


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (None, "this map is conditional: give condition="),
        ("middle", "condition 'middle' is not known; the conditions are left, right"),
        ([0, 1], "condition holds 2 conditions for 24 samples"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(condition, message):
    model = MongeMap(map=ConditionalMap(2, num_conditions=2, hidden=(8,)), condition_names=["left", "right"])
    with pytest.raises(ValueError, match=message):
        model.transport(gaussians(24)[0], condition)
    with pytest.raises(ValueError, match="this map has no conditions"):
        small().transport(gaussians(24)[0], 0)


def test_a_number_that_is_the_name_of_another_label_is_refused():
    model = MongeMap(map=ConditionalMap(2, num_conditions=3, hidden=(8,)), condition_names=["1", "2", "10"])
    x = gaussians(24)[0]
    for condition in (1, 10, np.full(24, 2)):
        with pytest.raises(ValueError, match=r"could be the label [0-9]+, or the name"):
            model.transport(x, condition)
    assert torch.equal(model.transport(x, "10"), model.transport(x, torch.tensor(2)))
    assert torch.equal(model.transport(x, 0), model.transport(x, "1"))
    same = MongeMap(map=ConditionalMap(2, num_conditions=2, hidden=(8,)), condition_names=["0", "1"])
    assert same.transport(x, 1).shape == x.shape


def test_doses_are_numbers_one_for_all_or_one_each():
    model = MongeMap(map=ConditionalMap(2, condition_dim=1, hidden=(8,)), condition_names=["low", "high"])
    x = gaussians(24)[0]
    for dose in (1, [1], np.ones(24), np.ones(24, dtype=int), torch.ones(24, 1)):
        assert torch.equal(model.transport(x, dose), model.transport(x, 1.0))
    with pytest.raises(ValueError, match="condition=low is a name, but the conditions of this map are vectors of 1"):
        model.transport(x, "low")


def test_conservativity_needs_a_field():
    with pytest.raises(MisconfigurationException, match="ResidualMLP has none: give map=StructuredMap"):
        fit_batch(small(conservative_weight=0.1), gaussians(20))


def test_conservativity_makes_the_field_a_gradient():
    source, target = gaussians(40)
    turned = target @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    last = {}
    for weight in (0.0, 10.0):
        torch.manual_seed(0)
        model = MongeMap(
            map=StructuredMap(2, cost="sqeuclidean", hidden=(16,)), conservative_weight=weight, gap_weight=0.0,
            optimizer=partial(Adam, lr=0.03),
        )  # fmt: skip
        fit_batch(model, (source, turned), max_epochs=40)
        x = source.requires_grad_()
        jacobian = torch.autograd.functional.jacobian(lambda s, m=model: m.map.field(s).sum(0), x.detach()).permute(
            1, 0, 2
        )
        last[weight] = float((jacobian - jacobian.mT).square().sum((1, 2)).mean())
    assert last[10.0] < 0.05 * last[0.0]


class StartsFromData(nn.Module):
    """A shift that starts at the difference of the means."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2))
        self.seen = []

    def start(self, source, target):
        self.seen.append((len(source), len(target)))
        self.shift.copy_(target.mean(0) - source.mean(0))

    def forward(self, x):
        return x + self.shift


def test_a_map_starts_from_the_training_samples_once():
    source, target = gaussians(100)
    network = StartsFromData()
    model = MongeMap(map=network, optimizer=STILL)
    data = SamplesDataModule(source, target, batch_size=30, val_fraction=0.1)
    trainer().fit(model, data)
    trainer().fit(model, data)
    assert network.seen == [(90, 90)]
    start = torch.stack([part.mean(0) for part in data.training_samples()]).diff(dim=0)[0]
    torch.testing.assert_close(network.shift, start, atol=1e-5, rtol=0)


def test_a_map_starts_from_the_first_batch_of_a_plain_loader():
    network = StartsFromData()
    fit_batch(MongeMap(map=network, optimizer=STILL), gaussians(20), max_epochs=2)
    assert network.seen == [(20, 20)]


def test_samples_are_encoded_and_images_decoded():
    source, target = gaussians(200)
    scale = torch.tensor([100.0, 0.01])
    data = SamplesDataModule(source * scale, target * scale, batch_size=64, standardize=True)
    model = small(hidden=(), optimizer=partial(Adam, lr=0.05))
    run = trainer(max_epochs=60)
    run.fit(model, data)
    assert isinstance(model.representation, AffineRepresentation)
    mapped = model.transport(source * scale)
    torch.testing.assert_close(mapped.mean(0) / scale, target.mean(0), atol=0.4, rtol=0)
    assert torch.equal(torch.cat(run.predict(model, data)), mapped)
    other = SamplesDataModule(source, target, batch_size=64, standardize=True)
    with pytest.raises(MisconfigurationException, match="encodes samples otherwise than in this map's training"):
        trainer().fit(model, other)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"fitting_loss": "mmd"},
            ValueError,
            "fitting_loss must be one of sinkhorn, energy, semidual, or a function, got 'mmd'",
        ),
        ({"reweight": True}, ValueError, "reweight=True needs rho"),
        ({"rho": 1.0, "fitting_loss": "energy"}, ValueError, "rho softens .* Sinkhorn divergence only"),
        ({"gap_on": "reference"}, ValueError, "gap_on='reference' needs gap_reference"),
        ({"gap_on": "target"}, ValueError, "gap_on must be one of source, reference, both, got 'target'"),
        ({"gap_reference": [[math.nan, 0.0]]}, ValueError, "gap_reference holds NaN or infinity in 1 of 1 rows"),
        ({"epsilon_factor": 0.0}, ValueError, "epsilon_factor must be a positive finite number, got 0.0"),
        ({"conservative_weight": -1.0}, ValueError, "conservative_weight must be a finite number of at least 0"),
        ({"conservative_probes": 0}, ValueError, "conservative_probes must be at least 1, got 0"),
        ({"relative_gap_epsilon": math.inf}, ValueError, "relative_gap_epsilon must be a positive finite number"),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        MongeMap(2, **options)


@pytest.mark.parametrize(
    ("source", "target"),
    [((4, 2), (3, 4, 2)), ((2, 4, 2), (3, 4, 2)), ((4, 2), (4, 3))],
)
def test_batches_that_do_not_fit_are_refused(source, target):
    with pytest.raises(ValueError, match="all but the numbers of samples must agree"):
        fit_batch(small(), (torch.zeros(source), torch.zeros(target)))


@pytest.mark.parametrize(("weight", "message"), [(-1.0, "got -1.0 in row 2"), (math.nan, "got nan")])
def test_weights_of_a_plain_loader_are_looked_at_once(weight, message):
    source, target = gaussians(8)
    weights = torch.full((8,), 1 / 8)
    weights[2] = weight
    with pytest.raises(ValueError, match=f"target_weights must be .*{message}"):
        fit_batch(small(), UnpairedBatch(source, target, target_weights=weights))


@pytest.mark.parametrize("conditional", [False, True])
def test_batches_of_held_out_samples_are_predicted_from_the_coordinates_they_are_in(conditional):
    source, target = gaussians(120)
    labels = ["a", "b"] * 60
    options = {"conditions": (labels, labels)} if conditional else {}
    data = SamplesDataModule(100 * source, 100 * target, batch_size=16, standardize=True, **options)
    model = MongeMap(hidden=(8,), optimizer=partial(Adam, lr=0.05))
    run = trainer()
    run.fit(model, data)
    held_out = [batch.source for batch in data.val_dataloader()]
    predicted = trainer().predict(model, data.val_dataloader())
    for x, images, name in zip(held_out, predicted, ["a", "b"], strict=False):
        raw = model.representation.decode(x)
        expected = model.transport(raw.flatten(0, -2), name if conditional else None).view(x.shape)
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_sixteen_bits_for_everything_are_refused(precision):
    with pytest.raises(MisconfigurationException, match="use 'bf16-mixed' or '16-mixed'"):
        fit_batch(small(), gaussians(20), precision=precision)


def test_a_map_of_another_dimension_is_refused():
    with pytest.raises(ValueError, match="dim=3, but the map was made with dim=2: leave dim out"):
        MongeMap(3, map=StructuredMap(2))
