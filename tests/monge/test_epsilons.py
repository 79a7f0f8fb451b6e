"""Relative epsilons: decided once, by all training samples, and by no one of them."""

import math

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.tuner import Tuner
from monge_runs import fit_batch, gaussians, small, trainer, weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_gap import MongeMap, SamplesDataModule
from lightning_gap.monge import ResidualMLP, UnpairedBatch
from lightning_gap.monge.objective import ObjectiveTerms

NAMES = ("fitting_epsilon", "gap_epsilon")
SOURCE, TARGET = gaussians(300)


def decided(source=SOURCE, target=TARGET, *, model: dict | None = None, **options) -> torch.Tensor:
    """Return both epsilons after a fit's start."""
    net = small(**(model or {}))
    data = SamplesDataModule(source, target, **{"batch_size": 32, "val_fraction": 0, **options})
    trainer(max_steps=0, limit_val_batches=0).fit(net, data)
    return torch.stack([getattr(net, name) for name in NAMES])


@pytest.mark.parametrize(
    ("cost", "n"),
    [*((cost, 150) for cost in ("sqeuclidean", "euclidean", "elastic(lam=1)", "pnorm(p=1.5)")), ("sqeuclidean", 3000)],
)
@pytest.mark.parametrize("sides", [(0,), (1,), (0, 1)], ids=["source", "target", "both"])
def test_one_outlier_does_not_move_them(cost, n, sides):
    given = gaussians(n)
    moved = [x.clone() for x in given]
    for side in sides:
        moved[side][n // 3] = 1e4
    options = {"model": {"cost": cost, "fitting_cost": cost}}
    torch.testing.assert_close(decided(*moved, **options), decided(*given, **options), rtol=0.05, atol=0)


@pytest.mark.parametrize("n", [300, 3000])
def test_neither_the_order_nor_the_batches_nor_the_seed_decide_them(n):
    source, target = gaussians(n)
    expected = decided(source, target)
    assert torch.equal(decided(source, target, batch_size=64, seed=1), expected)
    torch.testing.assert_close(decided(source.flip(0), target[torch.randperm(n)]), expected, rtol=1e-3, atol=0)
    # Encoded samples differ in their last digits, by the order in which their means were summed.
    encoded = decided(source, target, standardize=True)
    torch.testing.assert_close(decided(source.flip(0), target, standardize=True), encoded, rtol=0.02, atol=0)


def test_samples_without_weight_do_not_move_them():
    far = torch.full((60, 2), 50.0)
    weights = torch.cat([torch.ones(300), torch.zeros(60)])
    found = decided(torch.cat([SOURCE, far]), torch.cat([TARGET, -far]), weights=(weights, weights))
    torch.testing.assert_close(found, decided())


def test_weights_count():
    light = torch.where(torch.arange(300) < 150, 1.0, 0.2)
    assert not torch.allclose(decided(weights=(light, light)), decided(), rtol=1e-3)
    twice = torch.cat([SOURCE, SOURCE[:100]]), torch.cat([TARGET, TARGET[:100]])
    heavy = torch.where(torch.arange(300) < 100, 2.0, 1.0)
    torch.testing.assert_close(decided(weights=(heavy, heavy)), decided(*twice))


def test_without_outliers_they_are_shares_of_the_mean():
    fitting, gap = decided().tolist()
    assert fitting == pytest.approx(0.05 * float(torch.cdist(TARGET, TARGET).square().mean()), rel=1e-4)
    assert gap == pytest.approx(0.01 * float(torch.cdist(SOURCE, TARGET).square().mean()), rel=1e-4)


@pytest.mark.usefixtures("brief_starts")
def test_of_conditions_they_are_means():
    labels = np.array(["a"] * 100 + ["b"] * 200)
    found = decided(conditions=(labels, labels), model={"dim": None})
    each = [decided(SOURCE[part], TARGET[part]) for part in (slice(0, 100), slice(100, 300))]
    torch.testing.assert_close(found, (each[0] + each[1]) / 2)
    # A side without labels serves every condition.
    shared = decided(conditions=(None, labels), model={"dim": None})
    each = [decided(SOURCE, TARGET[part]) for part in (slice(0, 100), slice(100, 300))]
    torch.testing.assert_close(shared, (each[0] + each[1]) / 2)


def test_data_modules_of_ones_own_are_asked_for_their_training_samples():
    class Own(LightningDataModule):
        def training_samples(self):
            return SOURCE.double(), TARGET.double()

        def train_dataloader(self):
            return DataLoader([(SOURCE[:9], TARGET[:9])], batch_size=None)

        val_dataloader = train_dataloader

    model = small()
    trainer(max_steps=1).fit(model, Own())
    torch.testing.assert_close(torch.stack([model.fitting_epsilon, model.gap_epsilon]), decided())


def test_of_plain_loaders_the_first_batch_decides_by_its_weights():
    far = torch.full((3, 2), 1e3)
    w = torch.cat([torch.full((300,), 1 / 300), torch.zeros(3)])
    # Without a solver, which is not what is asked here.
    model = small(fitting_loss=lambda mapped, target, weights: mapped.square().mean(), gap_weight=0)
    fit_batch(model, UnpairedBatch(torch.cat([SOURCE, far]), torch.cat([TARGET, far]), w, w), max_steps=1)
    torch.testing.assert_close(torch.stack([model.fitting_epsilon, model.gap_epsilon]), decided())


def test_samplers_are_drawn_from():
    def normal(n, generator):
        return torch.randn(n, 2, generator=generator)

    found = decided(normal, normal, steps_per_epoch=2)
    torch.testing.assert_close(found, torch.tensor([0.2, 0.04]), rtol=0.1, atol=0)


@pytest.mark.parametrize("loss", ["energy", lambda mapped, target: (mapped.mean(0) - target.mean(0)).square().sum()])
def test_what_a_fit_does_not_use_need_not_be_decidable(loss):
    point = torch.ones(300, 2)
    model = small(fitting_loss=loss)
    trainer(max_steps=2, max_epochs=-1).fit(model, SamplesDataModule(SOURCE, point, batch_size=32))
    assert math.isnan(model.fitting_epsilon)
    assert float(model.gap_epsilon) > 0
    model = small(gap_weight=0, fitting_epsilon=1.0)
    trainer(max_steps=2, max_epochs=-1).fit(model, SamplesDataModule(point, point, batch_size=32))
    with pytest.raises(ValueError, match="fitting_epsilon cannot be decided from the training samples"):
        decided(SOURCE, point, model={"fitting_loss": loss, "rho": 5.0, "reweight": True})


def test_most_samples_at_one_place_leave_a_scale():
    target = torch.zeros(300, 2)
    target[::20] = 1.0
    assert bool((decided(SOURCE, target) > 0).all())


def test_a_second_fit_says_what_it_keeps():
    model = small()
    data = SamplesDataModule(SOURCE, TARGET, batch_size=32)
    trainer(max_steps=1).fit(model, data)
    before = weights(model)
    trainer(max_steps=1).fit(model, data)  # the same samples: nothing to say
    with pytest.warns(UserWarning, match=r"fitting_epsilon=0\.4\d*, which would be 4.* make a new MongeMap"):
        trainer(max_steps=1).fit(model, SamplesDataModule(SOURCE * 3, TARGET * 3.2, batch_size=32))
    for name in NAMES:
        assert torch.equal(weights(model)[name], before[name])
    given = small(fitting_epsilon=1.0, gap_epsilon=1.0)
    for scale in (1, 3):
        trainer(max_steps=1).fit(given, SamplesDataModule(SOURCE * scale, TARGET * scale, batch_size=32))


class Reads(TorchDispatchMode):
    """Counts the values that are read back from where tensors are."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


class Counted(MongeMap):
    """Counts what its steps read apart from the objective, which is the solver's."""

    def training_step(self, batch, batch_idx):
        objective = self.objective
        self.objective = _Still(objective)
        try:
            with Reads() as reads:
                loss = super().training_step(batch, batch_idx)
        finally:
            self.objective = objective
        self.reads = [*getattr(self, "reads", []), reads.count]
        return loss


class _Still:
    def __init__(self, objective) -> None:
        self.objective = objective

    def __getattr__(self, name):
        return getattr(self.objective, name)

    def terms(self, source, mapped, target, **options):
        assert all(options[name] > 0 for name in NAMES)
        return ObjectiveTerms(mapped.square().mean(), mapped.abs().mean(), 0.0, True)


def test_a_step_reads_back_no_more_than_whether_the_batch_is_finite():
    model = Counted(map=ResidualMLP(2, (8,)))
    trainer(max_epochs=2).fit(model, SamplesDataModule(SOURCE, TARGET, batch_size=64))
    assert len(model.reads) >= 6
    assert max(model.reads[1:]) == 2  # one on a device where each waits, see check_all_samples


def test_numbers_follow_states_that_are_loaded_and_buffers_before_a_run():
    model = small(fitting_epsilon=0.5)
    assert model.epsilons.fitting == 0.5
    model.load_state_dict({**model.state_dict(), "fitting_epsilon": torch.tensor(2.0)})
    assert model.epsilons.fitting == model.double().epsilons.fitting == 2.0
    assert model.epsilons.gap is None
    model = small(gap_epsilon=0.5)
    model.gap_epsilon.fill_(0.25)
    trainer(max_steps=1).fit(model, SamplesDataModule(SOURCE, TARGET, batch_size=32))
    assert model.epsilons.gap == float(model.gap_epsilon) == 0.25


@pytest.mark.parametrize("plain", [False, True])
def test_finders_leave_no_decision_behind(plain):
    model = small(map=ResidualMLP(2, (8,), start="mean"))
    data = SamplesDataModule(SOURCE, TARGET, batch_size=32, val_fraction=0.2)
    first = tuple(part.clone() for part in next(iter(data.train_dataloader()))[:2])
    given = (DataLoader([first] * 9, batch_size=None), DataLoader([first], batch_size=None)) if plain else (data,)
    model.lr = 0.01
    model.optimizer = lambda parameters: torch.optim.Adam(parameters, lr=model.lr)
    run = trainer(max_steps=2, max_epochs=-1, limit_val_batches=0)
    tuner = Tuner(run)
    for _ in range(2):
        tuner.lr_find(model, *given, num_training=5, attr_name="lr", update_attr=False)
    assert math.isnan(model.fitting_epsilon) or not plain
    run.fit(model, *given)
    target = first[1] if plain else data.training_samples()[1]
    expected = 0.05 * float(torch.cdist(target, target).square().mean())
    assert float(model.fitting_epsilon) == pytest.approx(expected, rel=1e-4)
    assert float(model.started) == float(model.map.started) == 1


def test_a_subclass_may_keep_hyperparameters_of_its_own():
    class Own(MongeMap):
        def __init__(self, width: int = 8) -> None:
            super().__init__(2, hidden=(width,), gap_epsilon=0.5)
            self.save_hyperparameters()

    model = Own()
    trainer(max_steps=1).fit(model, SamplesDataModule(SOURCE, TARGET, batch_size=32))
    assert float(model.gap_epsilon) == 0.5
    assert float(model.fitting_epsilon) > 0
