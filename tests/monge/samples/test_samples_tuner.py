"""Batch sizes that nobody names: the default one, and Lightning's batch size finder."""

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.tuner import Tuner
from monge_runs import small, trainer

from lightning_gap import SamplesDataModule

QUIET = "ignore:.*turning off the .* dataloader shuffling.*"
pytestmark = [
    # Where nothing is held out.
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
    # Of batches of two samples, which are not what is looked at here.
    pytest.mark.filterwarnings("ignore::lightning_gap.monge.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore:at update .* the solver stopped"),
]


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch, tmp_path):
    """The finder frees a GPU's memory at each trial, which takes most of its time here, and saves where it stands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning.pytorch.tuner.batch_size_scaling.garbage_collection_cuda", lambda: None)


def samples(n: int) -> torch.Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(n))


def endless(n, generator):
    return torch.randn(n, 2, generator=generator)


def found_by(data, mode, *, trials=12, start=2, **options):
    run = trainer(max_steps=3, max_epochs=-1)
    return Tuner(run).scale_batch_size(
        small(), datamodule=data, mode=mode, steps_per_trial=1, max_trials=trials, init_val=start, **options
    )


@pytest.mark.parametrize(
    ("sizes", "options", "expected"),
    [
        ((40, 12), {"val_fraction": 0.2}, 8),
        ((8, 64), {"val_fraction": 0.0}, 8),
        ((3, 300), {"val_fraction": 0.0}, 2),
        ((15, 17), {"val_fraction": 0.0, "steps_per_epoch": 2}, 8),
    ],
)
@pytest.mark.parametrize("mode", ["power", "binsearch"])
def test_the_finder_goes_as_far_as_the_samples(sizes, options, expected, mode):
    data = SamplesDataModule(*map(samples, sizes), batch_size=2, **options)
    margin = {"margin": 0.0} if mode == "binsearch" else {}
    assert found_by(data, mode, **margin) == data.batch_size == expected
    batch = next(iter(data.train_dataloader()))
    assert len(batch.source) == len(batch.target) == expected


def test_the_finder_with_conditions_counts_the_smallest():
    labels = ["a"] * 40 + ["b"] * 12
    data = SamplesDataModule(samples(52), samples(52), conditions=(labels, labels), batch_size=2, val_fraction=0)
    run = trainer(max_steps=3, max_epochs=-1)
    assert Tuner(run).scale_batch_size(small(None), datamodule=data, steps_per_trial=1) == data.batch_size == 8


def test_the_finder_of_samplers_stops_by_its_own_limits():
    data = SamplesDataModule(endless, endless, batch_size=2, eval_batch_size=16)
    assert found_by(data, "power", trials=3) == data.batch_size == 8


def test_the_finder_as_a_callback():
    data = SamplesDataModule(samples(12), samples(12), batch_size=2, val_fraction=0)
    run = trainer(max_steps=3, max_epochs=-1, callbacks=[BatchSizeFinder(steps_per_trial=1)])
    run.fit(small(), data)
    assert data.batch_size == 8
    assert run.global_step == 3


def test_the_finder_of_held_out_batches():
    data = SamplesDataModule(samples(20), samples(20), batch_size=8, val_fraction=0.5, eval_batch_size=2)
    run = trainer()
    Tuner(run).scale_batch_size(small(), datamodule=data, method="validate", batch_arg_name="eval_batch_size")
    assert data.eval_batch_size == 16
    (batch,) = data.val_dataloader()
    assert len(batch.source) == 10


@pytest.mark.filterwarnings(QUIET)
@pytest.mark.parametrize(("overfit", "steps"), [(2, 2), (0.5, 3), (1.0, 6)])
def test_overfitting_counts_batches(overfit, steps):
    data = SamplesDataModule(samples(48), samples(48), batch_size=8, val_fraction=0)
    assert len(data.train_dataloader()) == 6
    run = trainer(max_epochs=1, overfit_batches=overfit)
    run.fit(small(), data)
    assert run.global_step == steps


@pytest.mark.parametrize(("sizes", "expected"), [((40, 300), 36), ((300, 20), 18), ((1, 1), 1)])
def test_the_default_batch_gives_way_to_a_small_set(sizes, expected):
    options = {"val_fraction": 0.0} if min(sizes) == 1 else {}
    with pytest.warns(UserWarning, match=rf"the default batch_size=256 shrinks to {expected}") as said:
        data = SamplesDataModule(*map(samples, sizes), **options)
    assert len(said) == 1
    assert data.batch_size == expected
    batch = next(iter(data.train_dataloader()))
    assert len(batch.source) == len(batch.target) == expected


def test_the_default_batch_is_256_where_there_are_as_many():
    assert SamplesDataModule(samples(285), samples(300)).batch_size == 256
    assert SamplesDataModule(endless, endless, eval_batch_size=16).batch_size == 256


def test_the_default_batch_gives_way_to_a_small_condition():
    labels = ["a"] * 40 + ["b"] * 12
    with pytest.warns(UserWarning, match=r"the default batch_size=256 shrinks to 11, because of .*small_conditions"):
        data = SamplesDataModule(samples(52), samples(52), conditions=(labels, labels))
    assert data.batch_size == 11


def test_a_batch_that_was_asked_for_does_not():
    with pytest.raises(ValueError, match=r"batch_size=256 is larger than the training split"):
        SamplesDataModule(samples(100), samples(100), batch_size=256)


@pytest.mark.parametrize("dtype", [float, np.float32, object, str])
def test_numbers_as_names_of_conditions(dtype, tmp_path):
    doses = np.array([0.1, 1.0, 25.0] * 20).astype(dtype)
    data = SamplesDataModule(samples(60), samples(60), conditions=(doses, doses), batch_size=4)
    if dtype is not str:
        assert data.condition_names == ("0.1", "1", "25")
    run, model = trainer(max_steps=1), small(None)
    run.fit(model, data)
    x = torch.randn(5, 2)
    for label, given in enumerate(([0.1, "0.1", np.float32(0.1), torch.tensor(0.1), "0.10", np.array([0.1] * 5)],
                                   [1.0, "1", "1.0", torch.tensor(1.0), 1],
                                   [25.0, "25", "25.0", torch.full((5,), 25.0)])):  # fmt: skip
        for condition in given:
            assert torch.equal(model.transport(x, condition), model.transport(x, torch.tensor(label)))
    with pytest.raises(ValueError, match=r"condition 0.2 is no name of a condition; the conditions are '0.1', '1"):
        model.transport(x, 0.2)
    with pytest.raises(ValueError, match=r"condition=25 could be the label 25, or the name '25(.0)?'"):
        model.transport(x, 25)
