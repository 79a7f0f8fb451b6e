"""BatchSizeSchedule beside other callbacks, and with data of many sources."""

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from planned_batches import BASE, STEPS, Planned
from regime_runs import EPOCH_SCHEDULES, EPOCHS, SAMPLES, Regression, dataset, loader, run, trainer_of
from torch.utils.data import DataLoader, WeightedRandomSampler

from lightning_gap import BatchSizeSchedule, GhostBatchNorm, GradientNoiseScale, UltraSlowDiffusion
from lightning_gap.regime import NoiseBatches

pytestmark = pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*", "ignore:.*callbacks used to create.*")


def test_a_plateau_of_the_users_counts_as_the_reference_runs():
    class Flat(Regression):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 1.0)

        def val_dataloader(self):
            return loader(60)

    plateau = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, factor=0.1, patience=1)
    callback = BatchSizeSchedule([(0, 4), (60, 16)], lr_rule="sqrt")
    _, trace = run(Flat(plateau, monitor="val_loss"), loader(BASE), callback, num_sanity_val_steps=0)
    # The first epoch is the best, two more are waited for, and then every second one is a tenth.
    assert trace.rates[0][0] == 1e-3
    assert trace.rates[15][0] == pytest.approx(2e-3)
    assert trace.rates[-1][0] == pytest.approx(1e-5 * 3**0.5)  # 12 samples, the last of an epoch


class Data(LightningDataModule):
    """Makes its data in setup."""

    def setup(self, stage):
        self.data = dataset()

    def train_dataloader(self):
        return DataLoader(self.data, BASE, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.data, 30)


class OwnData(Regression):
    """Makes its data in its own setup, and asks for the length of the run."""

    def setup(self, stage):
        self.data = dataset()

    def train_dataloader(self):
        return DataLoader(self.data, BASE, shuffle=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        total = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize("ask", ["estimated_stepping_batches", "num_training_batches", "len"])
def test_a_length_that_is_asked_for_is_the_reference_runs(ask):
    found = []

    class Asks(OwnData):
        def configure_optimizers(self):
            lengths = {
                "estimated_stepping_batches": lambda: self.trainer.estimated_stepping_batches // EPOCHS,
                "num_training_batches": lambda: self.trainer.num_training_batches,
                "len": lambda: len(self.train_dataloader()),
            }
            found.append(lengths[ask]())
            return super().configure_optimizers()

    run(Asks(), None, BatchSizeSchedule(STEPS))
    assert found == [SAMPLES // BASE]


@pytest.mark.parametrize("module", [OwnData, Regression])
def test_data_may_be_made_in_setup(module):
    data = None if module is OwnData else Data()
    trainer, _ = run(module(), data, BatchSizeSchedule("seesaw" if module is OwnData else STEPS))
    assert trainer.global_step < SAMPLES // BASE * EPOCHS


def test_other_callbacks_see_this_run(tmp_path):
    logger = CSVLogger(tmp_path)
    callbacks = [
        BatchSizeSchedule(STEPS),
        LearningRateMonitor("step"),
        EarlyStopping("val_loss", patience=50),
        ModelCheckpoint(tmp_path, monitor="val_loss"),
        UltraSlowDiffusion(),
    ]
    trainer, trace = run(
        Regression(EPOCH_SCHEDULES["StepLR"]), Data(), *callbacks, logger=logger, enable_checkpointing=True,
        log_every_n_steps=1,
    )  # fmt: skip
    logger.save()
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    names = rows[0].split(",")
    values = {name: [] for name in names}
    for row in rows[1:]:
        for name, value in zip(names, row.split(","), strict=True):
            if value:
                values[name].append(float(value))
    assert values["lightning_gap/regime/samples_seen"][-1] == SAMPLES * EPOCHS
    assert set(values["lightning_gap/regime/batch_size"]) == {4, 12, 20}
    assert values["lr-SGD/pg1"] == pytest.approx([rates[0] for rates in trace.rates], rel=1e-6)
    assert trainer.checkpoint_callback.best_model_path


def test_ghosts_stay_as_large_while_the_batch_grows():
    class Normalized(Regression):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    seen = []

    class Ghosts(Callback):
        def on_train_start(self, trainer, pl_module):
            layer = pl_module.layer[0]
            layer.register_forward_hook(lambda layer, inputs, _: seen.append((len(inputs[0]), layer.ghost_batch_size)))

    run(Normalized(), loader(BASE), BatchSizeSchedule(STEPS), GhostBatchNorm(4), Ghosts())
    assert {ghost for _, ghost in seen} == {4}
    assert {size for size, _ in seen} >= {4, 12, 20}


def test_a_sampler_of_the_users_draws():
    weights = torch.zeros(SAMPLES).index_fill(0, torch.arange(10), 1.0)
    data = DataLoader(dataset(), BASE, sampler=WeightedRandomSampler(weights.tolist(), SAMPLES))
    seen = []

    class Rows(Regression):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0])
            return super().training_step(batch, batch_idx)

    run(Rows(), data, BatchSizeSchedule(STEPS), max_epochs=2)
    drawn = torch.cat(seen)
    assert len(drawn) == 2 * SAMPLES
    assert all((row == dataset().tensors[0][:10]).all(1).any() for row in drawn)
    assert not torch.equal(drawn[:SAMPLES], drawn[SAMPLES:])


@pytest.mark.filterwarnings("ignore:.*batch size.*", "ignore:.*number of training batches.*")
def test_the_tuner_finds_a_rate_without_the_schedule(tmp_path):
    module = Regression(lr=1e-3)
    trainer = trainer_of(BatchSizeSchedule(STEPS), default_root_dir=tmp_path)
    Tuner(trainer).lr_find(module, loader(BASE), num_training=8, attr_name="lr")
    trainer.fit(module, loader(BASE))
    assert trainer.global_step == 42


class Noisy(LightningModule):
    """The mean of noise: its gradient for a sample has the variance 1 in each of 4 directions, and a mean of 1/8."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Linear(4, 1, bias=False)

    def training_step(self, batch, batch_idx):
        return self.weight(batch[0]).mean()  # the gradient of a sample is the sample

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(4096, 4, generator=generator)
        return DataLoader(torch.utils.data.TensorDataset(x - x.mean(0) + 1 / 8), 8, shuffle=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("most", [None, 16])
def test_the_batch_follows_the_measured_noise_scale(most, tmp_path):
    def fit(*callbacks, ckpt_path=None):
        schedule = BatchSizeSchedule(NoiseBatches(), max_batch_size=512, max_device_batch_size=most)
        noise = GradientNoiseScale(every_n_updates=1, source="examples", decay=0.98)
        planned = Planned(schedule)
        run(Noisy(), None, schedule, noise, planned, *callbacks, max_epochs=2, ckpt_path=ckpt_path)
        return noise.estimate.critical_batch_size, [batch for _, batch in planned.planned]

    class Saves(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 30:
                trainer.save_checkpoint(tmp_path / "30.ckpt")

    found, batches = fit(Saves())
    assert found == pytest.approx(4 / (4 / 64), rel=0.5)  # 64
    assert batches[0] == 8
    assert 32 <= max(batches) <= 128
    assert fit(ckpt_path=tmp_path / "30.ckpt")[1] == batches[30:]


def test_a_noise_scale_that_nothing_measures_is_refused():
    with pytest.raises(MisconfigurationException, match="Add GradientNoiseScale"):
        run(Noisy(), None, BatchSizeSchedule("noise", max_batch_size=64))
    with pytest.raises(MisconfigurationException, match="Put it after"):
        run(Noisy(), None, GradientNoiseScale(), BatchSizeSchedule("noise", max_batch_size=64))
    with pytest.raises(MisconfigurationException, match=r"norm='l1' is another number. Pass norm=\"euclidean\""):
        run(Noisy(), None, BatchSizeSchedule("noise", max_batch_size=64), GradientNoiseScale(norm="l1"))
