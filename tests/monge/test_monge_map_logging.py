"""MongeMap hands its values on to loggers and callbacks, step by step."""

from functools import partial

import pytest
from lightning.pytorch.loggers import CSVLogger
from monge_runs import Metrics, samples, small, trainer
from torch.optim.lr_scheduler import StepLR

from lightning_gap import MongeMap
from lightning_gap.monge import Anneal


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
