"""What MongeMap says of results that mislead, once; and the scheduler that waits for a plateau."""

import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from monge_runs import FAST, gaussians, samples, small, trainer
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_gap import MongeMap, SamplesDataModule
from lightning_gap.monge import ConditionalMap


class Shrunk(nn.Module):
    """The best map there is, its images drawn together."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x):
        return self.factor * x


def many_features(n: int = 240, dim: int = 30) -> SamplesDataModule:
    draws = torch.Generator().manual_seed(0)
    sides = (torch.randn(n, dim, generator=draws) for _ in range(2))
    return SamplesDataModule(*sides, batch_size=50, val_fraction=0.5)


def shrunk(factor: float, **options) -> MongeMap:
    return MongeMap(map=Shrunk(factor), optimizer=partial(SGD, lr=0.0), relative_fitting_epsilon=0.2, **options)


def test_images_drawn_together_are_said_once_a_fit():
    model = shrunk(0.6)
    for _ in range(2):
        with pytest.warns(UserWarning, match="images are drawn together.*val_energy_distance for early") as said:
            trainer(max_epochs=3, num_sanity_val_steps=0).fit(model, many_features())
        assert len([w for w in said if "drawn together" in str(w.message)]) == 1


@pytest.mark.parametrize(
    ("factor", "options", "data"),
    [(1.0, {}, {}), (1.3, {}, {}), (0.6, {"fitting_loss": "energy"}, {}), (0.6, {}, {"n": 100}), (0.6, {}, {"dim": 1})],
)
def test_other_images_are_not(factor, options, data):
    trainer(num_sanity_val_steps=0).fit(shrunk(factor, **options), many_features(**data))


def test_samples_that_are_held_out_and_trained_on_have_no_floor():
    x, y = gaussians(120)
    trainer(num_sanity_val_steps=0).fit(small(), SamplesDataModule(x, y, batch_size=20, val=(x, y)))


def doses(vectors) -> SamplesDataModule:
    labels = [list(vectors)[i % len(vectors)] for i in range(120)]
    return samples(conditions=(labels, labels), condition_vectors=vectors, batch_size=10)


def test_doses_far_outside_training_are_said(tmp_path):
    model = MongeMap(map=ConditionalMap(2, (8,), condition_dim=1), optimizer=FAST)
    run = trainer(max_steps=2, max_epochs=-1)
    run.fit(model, doses({"low": [1.0], "middle": [2.0], "high": [4.0]}))
    run.save_checkpoint(tmp_path / "map.ckpt")
    x = gaussians(5)[0]
    for m in (model, MongeMap.load_from_checkpoint(tmp_path / "map.ckpt", weights_only=True)):
        assert m.condition_range == [[1.0], [4.0]]
        for dose in (1.0, 3.0, 5.0, 0.0):  # a little outside is what a map of doses is for
            m.transport(x, dose)
        for dose in (100.0, -3.0):
            with pytest.warns(UserWarning, match=rf"has {dose:g} in entry 0, and the map was trained from 1 to 4"):
                m.transport(x, dose)
        each = torch.tensor([[2.0], [2.0], [9.0], [1.0], [2.0]])
        with pytest.warns(UserWarning, match=r"condition\[2\] has 9 .* \(1 of 5 conditions are\)"):
            m.transport(x, each)
    run = trainer(max_steps=1)
    run.fit(model, doses({"low": [1.0], "high": [100.0]}))
    assert model.condition_range == [[1.0], [100.0]]
    model.transport(x, 100.0)


def test_conditions_that_are_held_out_whole_are_no_part_of_the_range():
    labels = ["a", "b"] * 60
    far = {"source": gaussians(20)[0], "target": gaussians(20)[1], "conditions": (["c"] * 20, ["c"] * 20)}
    vectors = {"a": [0.0, 1.0], "b": [1.0, 1.0], "c": [7.0, 1.0]}
    data = SamplesDataModule(*gaussians(120), batch_size=10, conditions=(labels, labels), val=far,
                             condition_vectors=vectors)  # fmt: skip
    model = MongeMap(hidden=(8,))
    trainer(max_steps=1).fit(model, data)
    assert model.condition_range == [[0.0, 1.0], [1.0, 1.0]]
    with pytest.warns(UserWarning, match="has 1.5 in entry 1, and the map was trained from 1 to 1"):
        model.transport(gaussians(5)[0], [0.5, 1.5])


class Rates(Callback):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("every", [1, 2])
def test_a_plateau_lowers_the_rate_after_validations(every):
    watch = Rates()
    # Nothing is better than anything: each validation after the first is one too many.
    plateau = partial(ReduceLROnPlateau, factor=0.1, patience=0, threshold=0.99, eps=0)
    model = small(optimizer=partial(SGD, lr=1e-6), lr_scheduler=plateau)
    trainer(max_epochs=6, check_val_every_n_epoch=every, callbacks=[watch]).fit(model, samples())
    expected = [1e-6, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10] if every == 1 else [1e-6, 1e-6, 1e-6, 1e-6, 1e-7, 1e-7]
    assert watch.rates == pytest.approx(expected)


def test_a_plateau_of_a_value_that_is_not_there_is_told_which_there_are(tmp_path):
    plateau = {"lr_scheduler": ReduceLROnPlateau, "lr_scheduler_monitor": "lightning_gap/monge/train_loss"}
    model = small(**plateau)
    run = trainer(max_epochs=2, limit_val_batches=0)
    run.fit(model, samples())
    run.save_checkpoint(tmp_path / "map.ckpt")
    loaded = MongeMap.load_from_checkpoint(tmp_path / "map.ckpt", weights_only=True)
    assert loaded.lr_scheduler_monitor == "lightning_gap/monge/train_loss"
    assert loaded.lr_scheduler is ReduceLROnPlateau
    with pytest.raises(MisconfigurationException, match="val_energy_distance which is not available"):
        trainer(limit_val_batches=0).fit(small(lr_scheduler=ReduceLROnPlateau), samples())


def test_observers_say_nothing_in_an_ordinary_fit():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*does not have many workers|.*logging interval|.*LeafSpec.*")
        trainer(max_epochs=2).fit(small(), samples())
