"""BatchSizeSchedule on one, two and four gloo processes: the same updates, whatever parts they are made of."""

import json
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_gap import BatchSizeSchedule, GhostBatchNorm
from lightning_gap.regime import PlateauBatches

pytestmark = pytest.mark.distributed
STEPS = [(0, 4), (70, 12), (130, 20)]


class Network(LightningModule):
    def __init__(self, samples, *, own_sampler=False, ghosts=False):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        middle = torch.nn.BatchNorm1d(6) if ghosts else torch.nn.Tanh()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 6), middle, torch.nn.Linear(6, 1)).double()
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        x = torch.randn(samples, 4, generator=generator).double()
        self.dataset, self.own_sampler = TensorDataset(x, x.sum(1, keepdim=True)), own_sampler

    def train_dataloader(self):
        if self.own_sampler:
            return DataLoader(self.dataset, 4, sampler=DistributedSampler(self.dataset, shuffle=True))
        return DataLoader(self.dataset, 4, shuffle=True)

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", torch.ones(()) * (1 + self.global_rank))  # each rank has its own
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)]


class Record(Callback):
    def __init__(self, folder):
        self.folder, self.rates, self.sizes = folder, [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.sizes.append(len(batch[0]))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_end(self, trainer, pl_module):
        weights = torch.cat([parameter.flatten() for parameter in pl_module.parameters()]).tolist()
        record = {"rates": self.rates, "weights": weights, "sizes": self.sizes, "steps": trainer.global_step}
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(record))


def records(folder, processes=1, *, samples=61, schedule=STEPS, callbacks=(), options=None, ckpt_path=None, **network):
    folder.mkdir()
    seed_everything(3, verbose=False)
    callback = BatchSizeSchedule(schedule, **(options or {}))
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=DDPStrategy(start_method="fork", process_group_backend="gloo") if processes > 1 else "auto",
        max_epochs=4,
        callbacks=[callback, *callbacks, Record(folder)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Network(samples, **network), ckpt_path=ckpt_path)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.parametrize("samples", [61, 57])
def test_replicas_and_parts_make_the_updates_of_one_process(tmp_path, samples):
    make = partial(records, samples=samples)
    (alone,) = make(tmp_path / "alone")
    others = [
        *make(tmp_path / "parts", options={"max_device_batch_size": 3}),
        *make(tmp_path / "two", 2),
        *make(tmp_path / "two parts", 2, options={"max_device_batch_size": 3}),
        *make(tmp_path / "four", 4),
        *make(tmp_path / "own", 2, own_sampler=True),
    ]
    for record in others:
        assert record["steps"] == alone["steps"]
        assert record["rates"] == alone["rates"]
        torch.testing.assert_close(torch.tensor(record["weights"]), torch.tensor(alone["weights"]))


def test_ghosts_over_ranks_stay_as_large_while_the_batch_grows(tmp_path):
    schedule = [(0, 8), (80, 16)]
    (alone,) = records(tmp_path / "alone", samples=64, schedule=schedule, callbacks=[GhostBatchNorm(4)], ghosts=True)
    for record in records(
        tmp_path / "two", 2, samples=64, schedule=schedule, callbacks=[GhostBatchNorm(4)], ghosts=True
    ):
        assert record["rates"] == alone["rates"]
        torch.testing.assert_close(torch.tensor(record["weights"]), torch.tensor(alone["weights"]))


class Saves(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 20:
            trainer.save_checkpoint(self.path)


def test_a_run_goes_on_on_as_many_ranks_or_others(tmp_path):
    path = tmp_path / "at20.ckpt"
    whole = records(tmp_path / "whole", 2, callbacks=[Saves(path)])
    for processes in (1, 2):
        for record in records(tmp_path / f"resumed on {processes}", processes, ckpt_path=path):
            assert record["steps"] == whole[0]["steps"]
            torch.testing.assert_close(torch.tensor(record["weights"]), torch.tensor(whole[0]["weights"]))


def test_ranks_that_measure_differently_grow_alike(tmp_path):
    schedule = PlateauBatches("loss", patience=0)
    first, second = records(tmp_path / "plateau", 2, schedule=schedule, options={"max_batch_size": 16})
    assert first["steps"] == second["steps"]
    assert first["weights"] == second["weights"]
    assert max(first["sizes"]) == 8


def test_the_average_of_the_weights_is_that_of_one_process(tmp_path):
    folders, found = iter(("alone", "parts", "two")), []
    for processes, options in ((1, {}), (1, {"max_device_batch_size": 3}), (2, {})):
        average = EMAWeightAveraging(decay=0.9)
        found += records(tmp_path / next(folders), processes, callbacks=[average], options=options)
    (plain,) = records(tmp_path / "plain")
    for record in found:
        torch.testing.assert_close(torch.tensor(record["weights"]), torch.tensor(found[0]["weights"]))
        assert record["weights"] != plain["weights"]
