"""A network with two BatchNorm layers, its data, and trainers that say little."""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gap.ghost import GhostNorm


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4), nn.BatchNorm1d(4))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Validated(Net):
    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)


def data(n=64, batch_size=16):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, n, 4, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def trainer(*callbacks, folder=None, **options):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "callbacks": list(callbacks),
        "logger": CSVLogger(folder) if folder else False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**defaults | options)


def net(kind=Net):
    seed_everything(0, verbose=False)
    return kind()


def ghosts(module):
    return [layer for layer in module.modules() if isinstance(layer, GhostNorm)]


def saving(folder):
    return ModelCheckpoint(folder, save_last=True)
