"""Small fits of MongeMap, shared by its tests."""

from functools import partial

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.optim import Adam
from torch.utils.data import DataLoader

from lightning_gap import MongeMap, SamplesDataModule
from lightning_gap.monge import ResidualMLP

FAST = partial(Adam, lr=0.03)


def gaussians(n: int = 120, dim: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    source = torch.randn(n, dim, generator=generator)
    target = torch.randn(n, dim, generator=generator) @ torch.diag(torch.linspace(0.5, 2, dim)) + 3
    return source.to(dtype), target.to(dtype)


def samples(n: int = 120, *, batch_size: int = 32, val_fraction: float = 0.2, **options) -> SamplesDataModule:
    return SamplesDataModule(*gaussians(n), batch_size=batch_size, val_fraction=val_fraction, **options)


def small(dim: int | None = 2, **options) -> MongeMap:
    """Return a model with a small network at the identity; with the one that the data tell where there is no dim."""
    torch.manual_seed(0)
    hidden = options.pop("hidden", (16,))
    if dim is not None and "map" not in options:
        return MongeMap(dim, **{"map": ResidualMLP(dim, hidden), "hidden": hidden, "optimizer": FAST, **options})
    return MongeMap(dim, **{"hidden": hidden, "optimizer": FAST, **options})


def trainer(**options) -> Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return Trainer(**{**quiet, **options})


def fit_batch(model: MongeMap, batch: object, **options) -> None:
    """Fit one and the same batch, from a plain loader."""
    loader = DataLoader([batch], batch_size=None)
    trainer(num_sanity_val_steps=0, check_val_every_n_epoch=1000, **options).fit(model, loader, loader)


def weights(model: MongeMap) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class Metrics(Callback):
    """Keeps what was logged, update by update."""

    def __init__(self) -> None:
        self.train: list[dict[str, float]] = []
        self.lr: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.train.append({k.rsplit("/", 1)[1]: float(v) for k, v in trainer.callback_metrics.items()})
        self.lr.append(trainer.optimizers[0].param_groups[0]["lr"])
