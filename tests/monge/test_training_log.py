"""MongeMap hands its values on to loggers and callbacks, step by step."""

import csv
import logging
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from monge_runs import FAST, Metrics, fit_batch, gaussians, samples, small, trainer
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_gap import MongeMap, SamplesDataModule
from lightning_gap.monge import Anneal, UnpairedBatch


class Twice(MongeMap):
    """Lets Lightning log each value of a step once more, under ``again`` in the place of ``train``."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        values = {name: value for name, value in self.trainer.callback_metrics.items() if "/train_" in name}
        self.log_dict({name.replace("/train_", "/again_"): value for name, value in values.items()})
        return loss


class Each(Callback):
    """Keeps what callbacks see of each batch, by the names that ``Twice`` gives."""

    def __init__(self) -> None:
        self.seen = {"train": [], "again": []}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for stage, seen in self.seen.items():
            for metrics in (trainer.callback_metrics, trainer.logged_metrics):
                seen.append({n.partition(f"/{stage}_")[2]: float(v) for n, v in metrics.items() if f"/{stage}_" in n})


def rows(table: str, stage: str) -> list[tuple[str, str, dict[str, str]]]:
    """Return step, epoch and values of each row of a logger's file that holds values of a stage."""
    found = []
    for row in csv.DictReader(table.splitlines()):
        values = {name.partition(f"/{stage}_")[2]: v for name, v in row.items() if f"/{stage}_" in name and v}
        if values:
            found.append((row["step"], row["epoch"], values))
    return found


@pytest.mark.parametrize(
    ("options", "steps"),
    [({}, range(9)), ({"accumulate_grad_batches": 2}, range(6)), ({"log_every_n_steps": 2}, (1, 3, 5, 7))],
)
def test_each_step_is_logged_as_lightning_would(tmp_path, options, steps):
    """Two epochs of three batches with validations within, and a third one in a second fit."""
    watch = Each()
    given = {"max_epochs": 2, "log_every_n_steps": 1, "val_check_interval": 2, **options}
    run = trainer(callbacks=[watch], logger=CSVLogger(tmp_path), **given)
    torch.manual_seed(0)
    model = Twice(2, hidden=(8,), gap_weight=Anneal(2.0, 1.0, updates=4), optimizer=FAST)
    run.fit(model, samples())
    run.fit_loop.max_epochs = 3
    run.fit(model, samples())
    assert watch.seen["train"] == watch.seen["again"]
    assert len({step["loss"] for step in watch.seen["train"]}) == 9
    (table,) = (file.read_text() for file in tmp_path.rglob("metrics.csv"))
    assert rows(table, "train") == rows(table, "again")
    assert [int(step) for step, _, _ in rows(table, "train")] == list(steps)
    ours = [row for row in csv.DictReader(table.splitlines()) if row["lightning_gap/monge/train_loss"]]
    assert [float(row["lightning_gap/monge/updates"]) for row in ours] == list(steps)


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


class Deaf(MongeMap):
    """Has a hook of its own, and forgets that of its parent."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        pass


def test_a_hook_that_hides_the_log_is_told_of_once(tmp_path):
    given = {"map": small(), "optimizer": FAST}
    run = trainer(max_epochs=2, log_every_n_steps=1, logger=CSVLogger(tmp_path))
    with pytest.warns(UserWarning, match=r"loggers get no values of training; call super\(\)") as told:
        run.fit(Deaf(**given), samples())
    assert len([w for w in told if "loggers get no values" in str(w.message)]) == 1
    trainer(max_epochs=2).fit(Deaf(**given), samples())  # nothing to tell without a logger


def test_what_scores_leave_out_is_said_once_and_not_each_epoch(caplog):
    (source, target), run = gaussians(200), trainer(max_epochs=3)
    data = SamplesDataModule(source, target[:100], batch_size=32, val_fraction=0.2)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        run.fit(small(), data)
    said = [record.message for record in caplog.records if "target_again has fewer samples" in record.message]
    assert len(said) == 1
