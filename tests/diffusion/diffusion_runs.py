"""Runs that the tests watch, and the slow, obvious twins of what is measured."""

import csv

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gap.diffusion import (
    weight_displacement,
)

KEY = "lightning_gap/diffusion/"


class Net(LightningModule):
    """Dropout and shuffling use the RNG, BatchNorm keeps statistics: an observer that disturbs any of them shows."""

    def __init__(self, lr=0.05, milestones=()):
        super().__init__()
        self.lr, self.milestones = lr, list(milestones)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self.net(x), y))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, self.milestones, gamma=0.1)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Reference(Callback):
    """The slow obvious twin: copy all weights after every update, subtract in float64."""

    def __init__(self):
        self.start, self.distances = None, {}

    @staticmethod
    def vector(module):
        return torch.cat([p.detach().double().flatten() for p in module.parameters()])

    def on_train_start(self, trainer, pl_module):
        if self.start is None:
            self.start = self.vector(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.distances[trainer.global_step] = (self.vector(pl_module) - self.start).norm().item()


def loader(batch_size=8, n=80, shuffle=True):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=batch_size, shuffle=shuffle)


def trainer(tmp_path, callbacks, **kwargs):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
        "max_epochs": 12,
        "num_sanity_val_steps": 1,
    }
    return Trainer(callbacks=callbacks, **(defaults | kwargs))


def fit(tmp_path, *callbacks, model=None, data=None, ckpt_path=None, validate=False, **kwargs):
    torch.manual_seed(1)
    model = Net() if model is None else model
    run = trainer(tmp_path, list(callbacks), limit_val_batches=1.0 if validate else 0, **kwargs)
    run.fit(model, data or loader(), loader(shuffle=False), ckpt_path=ckpt_path)
    return run, model


def saver(path, step):
    class Saver(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == step:
                trainer.save_checkpoint(path)

    return Saver()


def read_csv(path):
    with open(path) as file:
        return list(csv.DictReader(file))


class Weights(Callback):
    """All weights after every update, in float64."""

    def __init__(self):
        self.after = {}

    @staticmethod
    def copy(module):
        return {name: p.detach().double().clone() for name, p in module.named_parameters()}

    def on_train_start(self, trainer, pl_module):
        self.after.setdefault(trainer.global_step, self.copy(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.after[trainer.global_step] = self.copy(pl_module)

    def displacement(self, t, *names):
        return weight_displacement(*({name: self.after[u][name] for name in names} for u in (t, 0)))
