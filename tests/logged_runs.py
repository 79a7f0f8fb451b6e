"""Short runs of both halves under any logger, and files as loggers leave them."""

import math

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gap import (
    GhostBatchNorm,
    GradientNoiseScale,
    LargeBatchRegime,
    MapFigure,
    MongeMap,
    SamplesDataModule,
    UltraSlowDiffusion,
)


class Net(LightningModule):
    """A regression that logs as users do."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02)


def trainer(folder, logger, **options):
    quiet = {
        "accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False,
        "num_sanity_val_steps": 0, "log_every_n_steps": 1, "default_root_dir": folder,
    }  # fmt: skip
    return Trainer(**{**quiet, "logger": logger, **options})


def large_batch_run(folder, logger, **options):
    """Fit at the batch 16 by the regime of the batch 4: 120 updates, so that a law can be fitted."""
    torch.manual_seed(0)
    x = torch.randn(48, 4)
    data = TensorDataset(x, x.sum(1, keepdim=True).sin())
    callbacks = [GradientNoiseScale(every_n_updates=2), LargeBatchRegime(4), GhostBatchNorm(4), UltraSlowDiffusion()]
    fit = trainer(
        folder, logger,
        **{"max_epochs": 10, "accumulate_grad_batches": 2, "callbacks": callbacks, **options},
    )  # fmt: skip
    fit.fit(Net(), DataLoader(data, 8), DataLoader(data, 16))
    return fit


def monge_run(folder, logger, dim=2, **options):
    """Fit a map for nine updates, with three validations."""
    torch.manual_seed(0)
    data = SamplesDataModule(torch.randn(80, dim), torch.randn(80, dim) + 2, batch_size=20)
    fit = trainer(folder, logger, **{"max_epochs": 3, "callbacks": [MapFigure(max_points=30)], **options})
    fit.fit(MongeMap(dim=dim, hidden=(8,)), data)
    return fit


def csv_run(folder, *, batch=64, accuracy=0.9, slope=2.0, points=40):
    """Write what CSVLogger leaves of a run, with numbers that are known."""
    folder.mkdir(parents=True)
    prefix = "lightning_gap/diffusion/"
    keys = ["epoch", "step", "val_accuracy", "train_loss", prefix + "distance", prefix + "updates"]
    laws = {"log_intercept": 1.0, "log_slope": slope, "log_r2": 0.99, "first_update": 1, "last_update": 1000}
    rows = [",".join(keys + [prefix + name for name in laws])]
    for i in range(points):
        t = 10 ** (3 * i / (points - 1))
        values = [i, round(t) - 1, accuracy * (1 - 1 / t), 1 / t, 1 + slope * math.log(t), t]
        rows.append(",".join(f"{value}" for value in values) + "," * len(laws))
    rows.append(f"{points},999,,,,," + ",".join(f"{value}" for value in laws.values()))
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    plan = {
        "reference_batch_size": 64, "batch_size": batch, "lr_rule": "sqrt", "lr_factor": (batch / 64) ** 0.5,
        "reference_updates": 1000, "updates": 1000, "reference_epochs": 10, "epochs": 10 * batch // 64,
    }  # fmt: skip
    lines = [f"lightning_gap/regime/{name}: {value}" for name, value in plan.items()]
    (folder / "hparams.yaml").write_text("\n".join([*lines, "lr: 0.1", "act: !!python/name:torch.nn.ReLU ''"]) + "\n")
    return folder


def run_to_target(folder, batch, *, noise=None, short=False, told=True, lr=0.1):
    """Write a run of CSVLogger whose loss falls to 0.3 in the 100 + 6400 / B updates of a trade-off, and on."""
    folder.mkdir(parents=True)
    updates = 100 + 6400 / batch
    prefix = "lightning_gap/regime/"
    rows = [f"step,val_loss,{prefix}updates,{prefix}critical_batch_size"]
    for i in range(1, 9 if short else 31):
        step = updates * i / 10
        rows.append(f"{step - 1},{1 - 0.7 * i / 10},,")
        rows.append(f"{step - 1},,{step},{noise or ''}")
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    (folder / "hparams.yaml").write_text(f"lr: {lr}\nweight_decay: 0.01\n" + (f"batch_size: {batch}\n" if told else ""))
    return folder
