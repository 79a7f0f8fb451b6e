"""LargeBatchRegime against real reference-batch runs: updates, learning rates at every update, resume, refusals."""

import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import (
    LearningRateMonitor,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regime_runs import EPOCH_SCHEDULES, EPOCHS, SAMPLES, Listed, Regression, dataset, loader, run, trainer_of
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from lightning_gap.regime import LargeBatchRegime, effective_batch_size

pytestmark = pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*", "ignore:.*callbacks used to create.*")


def assert_matches(module, *, batch, rule="sqrt", factor=None, reference=None, **options):
    """Compare a run at one batch with a real run at the reference batch of 4, update by update."""
    reference = reference or run(module(), loader(4))
    trainer, trace = run(module(), loader(batch), LargeBatchRegime(4, lr_rule=rule), **options)
    assert trainer.global_step == reference[0].global_step == EPOCHS * math.ceil(SAMPLES / 4)
    ratio = batch * options.get("accumulate_grad_batches", 1) / 4
    factor = math.sqrt(ratio) if factor is None else factor
    torch.testing.assert_close(trace.tensor, factor * reference[1].tensor, rtol=1e-9, atol=0)


@pytest.mark.parametrize("batch", [2, 12])
def test_smaller_and_other_batches_match(batch):
    module = partial(Regression, EPOCH_SCHEDULES["SequentialLR"])
    assert_matches(module, batch=batch)


@pytest.mark.parametrize(("interval", "frequency"), [("epoch", 2), ("step", 7)])
def test_frequencies_are_the_reference_runs(interval, frequency):
    exponential = EPOCH_SCHEDULES["ExponentialLR"]
    assert_matches(lambda: Regression(exponential, interval=interval, frequency=frequency), batch=30)


@pytest.mark.filterwarnings("ignore:.*OneCycleLR. scheduler is using.*")
def test_one_cycle_over_epochs_matches():
    assert_matches(lambda: Regression(partial(schedulers.OneCycleLR, max_lr=1e-2, total_steps=6)), batch=30)


@pytest.mark.parametrize("name", ["StepLR", "CosineAnnealingLR", "SequentialLR"])
def test_tensor_learning_rates_match(name):
    def module():
        return Regression(EPOCH_SCHEDULES[name], lr=torch.tensor(1e-3, dtype=torch.float64))

    assert_matches(module, batch=30)


@pytest.mark.parametrize(
    ("rule", "factor"), [(float, 7.5), ("none", 1.0), (lambda ratio: ratio**0.25, 7.5**0.25), ("sqrt", 7.5**0.5)]
)
def test_rules(rule, factor):
    assert_matches(lambda: Regression(EPOCH_SCHEDULES["StepLR"]), batch=30, rule=rule, factor=factor)


@pytest.mark.parametrize(("rule", "factor"), [("linear", 7.5), ("adam", math.sqrt(7.5))])
def test_rules_for_equal_samples_keep_the_epochs(rule, factor):
    kind = partial(torch.optim.Adam, betas=(0.95, 0.999)) if rule == "adam" else torch.optim.SGD
    module = partial(Regression, EPOCH_SCHEDULES["StepLR"], optimizer=kind)
    _, reference = run(module(), loader(4))
    trainer, trace = run(module(), loader(30), regime := LargeBatchRegime(4, lr_rule=rule))
    assert (trainer.global_step, regime.plan.train_longer) == (12, 0.0)
    torch.testing.assert_close(trace.tensor[::2], factor * reference.tensor[::15], rtol=1e-9, atol=0)
    with pytest.warns(UserWarning, match=f'lr_rule="{rule}" is derived for the same samples'):
        LargeBatchRegime(4, lr_rule=rule, train_longer=True)


@pytest.mark.parametrize("accumulate", [2, 4, 7])
def test_accumulation_counts_in_the_batch_and_not_in_the_updates(accumulate):
    assert_matches(lambda: Regression(EPOCH_SCHEDULES["StepLR"]), batch=6, accumulate_grad_batches=accumulate)


def test_two_schedulers_of_different_intervals_keep_their_order():
    class Both(Regression):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            epochs = {"scheduler": EPOCH_SCHEDULES["ExponentialLR"](optimizer), "interval": "epoch"}
            steps = {"scheduler": schedulers.MultiplicativeLR(optimizer, lambda step: 0.99), "interval": "step"}
            return [optimizer], [epochs, steps]

    assert_matches(Both, batch=30)


def test_dropped_last_batches_are_the_reference_runs():
    reference, _ = run(Regression(), loader(7, drop_last=True))
    trainer, _ = run(Regression(), loader(25, drop_last=True), LargeBatchRegime(7))
    assert trainer.global_step == reference.global_step == 6 * 8


def test_without_training_longer_only_the_rate_changes():
    plain, before = run(Regression(EPOCH_SCHEDULES["StepLR"]), loader(30))
    trainer, after = run(Regression(EPOCH_SCHEDULES["StepLR"]), loader(30), LargeBatchRegime(4, train_longer=False))
    assert (trainer.global_step, trainer.current_epoch) == (plain.global_step, plain.current_epoch)
    torch.testing.assert_close(after.tensor, math.sqrt(7.5) * before.tensor, rtol=1e-9, atol=0)


def test_without_training_longer_a_plateau_is_scaled():
    plateau = partial(schedulers.ReduceLROnPlateau, patience=0, factor=0.1, threshold=10.0, min_lr=2e-4)
    _, before = run(PlateauData(plateau), None)
    _, after = run(PlateauData(plateau), None, LargeBatchRegime(4, train_longer=False))
    assert before.tensor.min() == 2e-4
    torch.testing.assert_close(after.tensor, 2.0 * before.tensor, rtol=1e-9, atol=0)


class PlateauData(Regression):
    def __init__(self, schedule):
        super().__init__(schedule, monitor="val_loss")

    def train_dataloader(self):
        return loader(16)

    val_dataloader = train_dataloader


def test_the_same_batch_changes_nothing():
    _, plain = run(Regression(EPOCH_SCHEDULES["CosineAnnealingLR"]), loader(30))
    module = Regression(EPOCH_SCHEDULES["CosineAnnealingLR"], optimizer=None)
    trainer, trace = run(module, loader(30), LargeBatchRegime(30))
    assert trace.rates == plain.rates
    assert trainer.lr_scheduler_configs[0].interval == "epoch"


def test_sizes_taken_from_the_trainer_see_the_true_number_of_updates():
    class Sized(Regression):
        def configure_optimizers(self):
            self.steps = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    module = Sized()
    trainer, _ = run(module, loader(25), LargeBatchRegime(7))
    assert module.steps == trainer.global_step == 6 * 9


def test_max_steps_are_updates_already():
    trainer, trace = run(
        Regression(EPOCH_SCHEDULES["StepLR"]), loader(30), LargeBatchRegime(4), max_epochs=-1, max_steps=70
    )
    _, reference = run(Regression(EPOCH_SCHEDULES["StepLR"]), loader(4), max_epochs=-1, max_steps=70)
    assert trainer.global_step == 70
    torch.testing.assert_close(trace.tensor, math.sqrt(7.5) * reference.tensor, rtol=1e-9, atol=0)
    trainer, _ = run(Regression(), loader(30), LargeBatchRegime(4), max_steps=37)
    assert trainer.global_step == 37


def test_a_cut_last_epoch_ends_with_a_validation():
    class Data(LightningDataModule):
        def setup(self, stage):
            self.data = dataset()

        def train_dataloader(self):
            return DataLoader(self.data, batch_size=25)

        val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    # A reference epoch of 9 updates; epochs of 3 and of 2 updates here.
    trainer, trace = run(Regression(), Data(), LargeBatchRegime(7), max_epochs=5, min_epochs=5)
    assert trainer.global_step == 45
    assert trace.validated == [9, 18, 27, 36, 45]
    options = {"max_epochs": 5, "min_epochs": 5, "accumulate_grad_batches": 2}
    trainer, trace = run(Regression(), Data(), LargeBatchRegime(7), **options)
    assert trainer.global_step == 45
    assert trace.validated == [10, 18, 28, 36, 45]
    trainer, trace = run(Regression(), Data(), LargeBatchRegime(5), max_epochs=1, min_epochs=1)
    assert trainer.global_step == 12
    trainer, trace = run(Regression(), Data(), LargeBatchRegime(6), max_epochs=1, min_epochs=1)
    assert trainer.global_step == 10
    assert trace.validated == [10]


def test_every_logger_takes_the_plan(tmp_path):
    run(Regression(), loader(30), LargeBatchRegime(4), logger=TensorBoardLogger(tmp_path), max_epochs=1)
    assert "lightning_gap/regime/updates: 15" in next(tmp_path.rglob("hparams.yaml")).read_text()


def test_it_says_what_it_did(tmp_path, capsys):
    module = Regression(EPOCH_SCHEDULES["StepLR"])
    logger = CSVLogger(tmp_path)
    run(
        module, loader(30), LargeBatchRegime(4), LearningRateMonitor(), logger=logger, log_every_n_steps=1, max_epochs=2
    )
    table = capsys.readouterr().out
    assert table.count("Large-batch regime") == 1
    for said in ("7.5", "30", "StepLR", "0.00273861", "15 updates"):
        assert said in table
    hparams = {key.removeprefix("lightning_gap/regime/"): value for key, value in logger.experiment.hparams.items()}
    assert (hparams["updates"], hparams["epochs"], hparams["ratio"], hparams["batch_size"]) == (30, 15, 7.5, 30)
    assert any("lr-SGD" in row for row in logger.experiment.metrics) or (tmp_path / "lightning_logs").exists()


def test_a_column_of_the_monitor_follows_the_reference_epochs(tmp_path):
    import csv

    logger = CSVLogger(tmp_path)
    module = Regression(EPOCH_SCHEDULES["StepLR"])
    run(module, loader(30), LargeBatchRegime(4), LearningRateMonitor(), logger=logger, log_every_n_steps=1)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rates = [float(row["lr-SGD/pg1"]) for row in csv.DictReader(file) if row.get("lr-SGD/pg1")]
    assert len(rates) == 90
    assert len(set(rates)) == 3


@pytest.mark.parametrize("accumulate", [1, 3])
def test_effective_batch_size(accumulate):
    seen = []

    class Look(Callback):
        def setup(self, trainer, pl_module, stage):
            seen.append(effective_batch_size(trainer))

        def on_train_start(self, trainer, pl_module):
            seen.append(effective_batch_size(trainer))

    for data in (
        loader(10),
        [loader(10)],
        CombinedLoader(loader(10)),
        DataLoader(dataset(), batch_sampler=BatchSampler(RandomSampler(dataset()), 10, False)),
    ):
        trainer_of(Look(), max_epochs=1, accumulate_grad_batches=accumulate).fit(Listed(), data)
    assert seen == [10 * accumulate] * 8
    with pytest.raises(MisconfigurationException, match="no training data"):
        effective_batch_size(trainer_of())


def test_looking_at_the_loader_leaves_the_random_numbers_alone():
    class Splits(Regression):
        def train_dataloader(self):
            torch.rand(3)
            return loader(30)

    def draw(*callbacks):
        class Draws(Callback):
            def on_fit_start(self, trainer, pl_module):
                self.value = torch.rand(1)

        run(Splits(), None, *callbacks, draws := Draws())
        return draws.value

    assert torch.equal(draw(), draw(LargeBatchRegime(4)))
