"""BatchSizeSchedule beside other callbacks, precisions, strategies and sources of data."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from gloo import enter_world, free_port
from lightning.pytorch import Callback, LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regime_runs import EPOCH_SCHEDULES, EPOCHS, SAMPLES, Regression, dataset, loader, run, trainer_of
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, WeightedRandomSampler

from lightning_gap import BatchSizeSchedule, GhostBatchNorm, GradientNoiseScale, UltraSlowDiffusion
from lightning_gap.regime import NoiseBatches

pytestmark = pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*", "ignore:.*callbacks used to create.*")
BASE, STEPS = 4, [(0, 4), (100, 12), (200, 20)]


def reference_at(trace, reference):
    """Return the reference run's rates at the samples before each update, times the rule."""
    return [
        [rate * math.sqrt(size / BASE) for rate in reference.rates[samples // BASE]] for samples, size in trace.planned
    ]


class Planned(Callback):
    """The samples before each update, and the batch of its schedule."""

    def __init__(self, schedule):
        self.schedule, self.planned = schedule, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        part = self.schedule._run.part
        self.planned.append((self.schedule.samples_seen, min(part.batch_size, max(BASE, part.ends - part.begins))))


def test_mixed_precision_with_skipped_updates():
    class Overflows(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if self.trainer.global_step in (0, 10, 11) else loss

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    schedule = EPOCH_SCHEDULES["StepLR"]
    _, reference = run(Regression(schedule), loader(BASE))
    callback = BatchSizeSchedule(STEPS, lr_rule="sqrt", max_device_batch_size=7)
    planned = Planned(callback)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    trainer, trace = run(module := Overflows(schedule), loader(BASE), callback, planned, plugins=plugins)
    assert trainer.global_step == 42
    wanted = torch.tensor(reference_at(planned, reference), dtype=torch.float64)
    torch.testing.assert_close(trace.tensor, wanted, rtol=1e-12, atol=0)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_a_compiled_module_trains_as_the_plain_one():
    class Quiet(Regression):
        def training_step(self, batch, batch_idx):  # Lightning's self.log does not compile
            return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    weights = []
    for wrap in (partial(torch.compile, backend="eager"), lambda module: module):
        module = Quiet(EPOCH_SCHEDULES["CosineAnnealingLR"])
        run(wrap(module), loader(BASE), BatchSizeSchedule(STEPS, max_device_batch_size=7))
        weights.append(module.layer.weight)
    torch.testing.assert_close(*weights)


def test_rates_are_tensors_where_the_optimizer_keeps_tensors():
    def adam(groups, lr):
        return torch.optim.Adam([{**group, "lr": torch.tensor(float(group.get("lr", lr)))} for group in groups])

    _, reference = run(Regression(EPOCH_SCHEDULES["StepLR"]), loader(BASE))
    module = Regression(EPOCH_SCHEDULES["StepLR"], optimizer=adam)
    callback = BatchSizeSchedule(STEPS, lr_rule="sqrt")
    planned = Planned(callback)
    trainer, trace = run(module, loader(BASE), callback, planned)
    assert isinstance(trainer.optimizers[0].param_groups[0]["lr"], torch.Tensor)
    assert trace.rates == [pytest.approx(rates, rel=1e-5) for rates in reference_at(planned, reference)]


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


def test_the_same_trainer_fits_again_as_the_first_time():
    callback = BatchSizeSchedule(STEPS)
    trainer = trainer_of(callback)
    first, second = Regression(EPOCH_SCHEDULES["StepLR"]), Regression(EPOCH_SCHEDULES["StepLR"])
    second.load_state_dict(first.state_dict())
    data = loader(BASE)
    trainer.fit(first, data)
    steps = trainer.global_step
    trainer = trainer_of(callback)
    trainer.fit(second, data)
    assert trainer.global_step == steps
    assert torch.equal(first.layer.weight, second.layer.weight)


def test_a_fast_dev_run_runs():
    trainer, _ = run(Regression(EPOCH_SCHEDULES["StepLR"]), loader(BASE), BatchSizeSchedule(STEPS), fast_dev_run=True)
    assert trainer.global_step == 1


@pytest.mark.filterwarnings("ignore:.*batch size.*", "ignore:.*number of training batches.*")
def test_the_tuner_finds_a_rate_without_the_schedule(tmp_path):
    module = Regression(lr=1e-3)
    trainer = trainer_of(BatchSizeSchedule(STEPS), default_root_dir=tmp_path)
    Tuner(trainer).lr_find(module, loader(BASE), num_training=8, attr_name="lr")
    trainer.fit(module, loader(BASE))
    assert trainer.global_step == 42


def test_a_failing_step_gives_everything_back():
    class Fails(Regression):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("failed")
            return super().training_step(batch, batch_idx)

    data = loader(BASE)
    trainer = trainer_of(BatchSizeSchedule(STEPS))
    with pytest.raises(RuntimeError, match="failed"):
        trainer.fit(Fails(), data)
    assert trainer.fit_loop._data_source.instance is data
    assert trainer.fit_loop.epoch_loop.max_steps == -1
    trainer = trainer_of(BatchSizeSchedule(STEPS))
    trainer.fit(Regression(), data)
    assert trainer.global_step == 42


def test_a_checkpoint_of_another_schedule_or_of_none_is_refused(tmp_path):
    trainer, _ = run(Regression(), loader(BASE), BatchSizeSchedule(STEPS), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "schedule.ckpt")
    trainer, _ = run(Regression(), loader(BASE), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    for path, callback, words in (
        ("schedule", BatchSizeSchedule([(0, 4), (8, 8)]), "another BatchSizeSchedule"),
        ("schedule", BatchSizeSchedule(STEPS, reference_batch_size=2), "reference_batch_size=4 and not 2"),
        ("plain", BatchSizeSchedule(STEPS), "without BatchSizeSchedule"),
    ):
        with pytest.raises(MisconfigurationException, match=words):
            run(Regression(), loader(BASE), callback, ckpt_path=tmp_path / f"{path}.ckpt")


# ------------------------------------------------------------------------------------------------- several processes


class Shards(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        torch.nn.init.constant_(self.layer.weight, 0.5)
        torch.nn.init.zeros_(self.layer.bias)

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    def train_dataloader(self):
        return loader(BASE, samples=61, shuffle=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)]


def fit(ckpt_path=None, max_epochs=4, **options):
    seed_everything(0, verbose=False)  # which processes of a strategy go back to
    module = Shards()
    trainer = trainer_of(BatchSizeSchedule(STEPS, max_device_batch_size=4), max_epochs=max_epochs, **options)
    trainer.fit(module, ckpt_path=ckpt_path)
    weight = module.layer.weight
    weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return trainer, weight.detach().clone()


def sharded(rank, port, folder):
    enter_world(rank, 2, port)
    strategy = partial(ModelParallelStrategy, data_parallel_size=2, tensor_parallel_size=1)
    trainer, whole = fit(strategy=strategy(), devices=2)
    stopped, _ = fit(strategy=strategy(), devices=2, max_epochs=2)
    stopped.save_checkpoint(f"{folder}/first.ckpt")
    # This strategy restores callbacks after on_fit_start, others before.
    _, rest = fit(strategy=strategy(), devices=2, ckpt_path=f"{folder}/first.ckpt")
    torch.save({"steps": trainer.global_step, "weights": [whole, rest]}, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_shards_train_as_one_process(tmp_path):
    torch.multiprocessing.spawn(sharded, (free_port(), str(tmp_path)), nprocs=2)
    trainer, alone = fit()
    for found in (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)):
        assert found["steps"] == trainer.global_step
        for weights in found["weights"]:
            torch.testing.assert_close(weights, alone)


SCRIPT = """
import sys, warnings, logging
warnings.simplefilter("ignore"); logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
from pathlib import Path
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from regime_runs import Regression, SCHEDULES, loader
from lightning_gap import BatchSizeSchedule
folder = Path(sys.argv[1])
seed_everything(0, verbose=False)
torch.set_num_threads(1)
module = Regression(lambda o: SCHEDULES["CosineAnnealingLR"](o, 15), interval="step")
save = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1, save_top_k=0)
trainer = Trainer(max_epochs=6, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
    callbacks=[BatchSizeSchedule([(0, 4), (100, 12), (200, 20)], max_device_batch_size=7), save])
last = folder / "last.ckpt"
(folder / "ready").touch()
trainer.fit(module, loader(4, shuffle=True), ckpt_path=str(last) if last.exists() else None)
torch.save({"weights": module.state_dict(), "steps": trainer.global_step}, folder / "end.pt")
"""


@pytest.mark.slow
def test_a_run_that_is_killed_at_twenty_moments_ends_as_one_that_is_not(tmp_path):
    random.seed(0)
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parents[1]}", "OMP_NUM_THREADS": "1"}

    def start(folder):
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-c", SCRIPT, str(folder)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    wanted = torch.load(tmp_path / "whole" / "end.pt")
    kills = 0
    for attempt in range(60):
        folder = tmp_path / f"killed{kills // 5}"
        (folder / "ready").unlink(missing_ok=True)
        process = start(folder)
        while not (folder / "ready").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.uniform(0.05, 0.6))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        if kills == 20:
            break
        assert attempt < 59
    for folder in sorted(tmp_path.glob("killed*")):
        assert start(folder).wait() == 0
        found = torch.load(folder / "end.pt")
        assert found["steps"] == wanted["steps"]
        for name, weight in wanted["weights"].items():
            assert torch.equal(found["weights"][name], weight)


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
