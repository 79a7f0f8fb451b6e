"""MongeMap hands its values on to loggers and callbacks, step by step."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from monge_runs import Metrics, fit_batch, gaussians, samples, small, trainer
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from lightning_gap import MongeMap
from lightning_gap.monge import Anneal, UnpairedBatch


def logged(folder, **options):
    """What a logger's file and a callback saw of two epochs of three batches with two validations each."""
    watch = Metrics()
    run = trainer(
        max_epochs=2, callbacks=[watch], logger=CSVLogger(folder), log_every_n_steps=1, val_check_interval=2, **options
    )
    model = small(gap_weight=Anneal(2.0, 1.0, updates=4), lr_scheduler=partial(StepLR, step_size=2))
    run.fit(model, samples())
    run.fit_loop.max_epochs = 3
    run.fit(model, samples())
    return (folder / "lightning_logs" / "version_0" / "metrics.csv").read_text(), watch.train


def by_log_dict(self, values, batch_idx, batch_size):
    self._log("train", values, batch_size=batch_size)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}])
def test_each_step_is_logged_as_lightning_would(tmp_path, monkeypatch, options):
    found = logged(tmp_path / "ours", **options)
    monkeypatch.setattr(MongeMap, "_log_step", by_log_dict)
    expected = logged(tmp_path / "lightning", **options)
    assert found == expected
    assert len({step["train_loss"] for step in found[1]}) == len(found[1]) == 9


def test_steps_are_logged_where_the_trainer_keeps_its_results_elsewhere(tmp_path, monkeypatch):
    expected = logged(tmp_path / "known")
    monkeypatch.setattr("lightning_gap.monge.module._results_of", lambda trainer: None)
    assert logged(tmp_path / "unknown") == expected


def test_an_interrupted_validation_leaves_nothing_for_the_next():
    class Stop(Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise RuntimeError("stopped")

    source, target = gaussians(40)
    loader = DataLoader([(source, target)], batch_size=None)
    model = small(fitting_epsilon=1.0, gap_epsilon=1.0)
    (expected,) = trainer().validate(model, loader, verbose=False)
    with pytest.raises(RuntimeError, match="stopped"):
        trainer(callbacks=[Stop()]).validate(model, DataLoader([(source, target + 9)], batch_size=None), verbose=False)
    assert trainer().validate(model, loader, verbose=False) == [expected]


def test_the_displacement_in_training_is_weighted():
    source, target = gaussians(20)
    weights = torch.zeros(20)
    weights[3] = 1.0
    network = nn.Linear(2, 2)
    watch = Metrics()
    model = MongeMap(map=network, optimizer=partial(SGD, lr=0.0), fitting_epsilon=1.0, gap_epsilon=1.0)
    fit_batch(model, UnpairedBatch(source, target, source_weights=weights), callbacks=[watch])
    expected = (source[3] - network(source[3]).detach()).square().sum()
    assert watch.train[0]["train_displacement"] == pytest.approx(float(expected), rel=1e-5)
