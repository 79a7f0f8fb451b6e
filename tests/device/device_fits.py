"""Small fits, on the CPU or on a device, that the tests share."""

from collections.abc import Sequence
from typing import Any

import torch
from counts import Counts, counting
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gap import MongeMap, SamplesDataModule

ACCELERATORS = {"cpu": "cpu", "cuda": "gpu"}


def trainer(device: str, **options: Any) -> Trainer:
    """Return a quiet trainer of one CPU or one GPU."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(
        accelerator=ACCELERATORS[device],
        devices=1,
        **{**quiet, "enable_model_summary": False, "max_epochs": 2, "num_sanity_val_steps": 0, **options},
    )


class Classifier(LightningModule):
    """A convolution and two batch normalizations, or none."""

    def __init__(self, *, normalized: bool = True) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4) if normalized else nn.Identity(),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * 36, 16),
            nn.BatchNorm1d(16) if normalized else nn.Identity(),
            nn.ReLU(),
            nn.Linear(16, 3),
        )

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def images(batch_size: int = 32) -> DataLoader[Any]:
    """Return 96 images of three classes, which differ in their mean."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96, device="cpu") % 3
    pixels = torch.randn(96, 1, 6, 6, generator=generator, device="cpu") + labels[:, None, None, None]
    return DataLoader(TensorDataset(pixels, labels), batch_size=batch_size)


def fit_classifier(
    device: str, callbacks: Sequence[Callback] = (), *, normalized: bool = True, **options: Any
) -> Classifier:
    """Return a classifier that has been trained for six updates, or as the options say."""
    seed_everything(0, verbose=False)
    model = Classifier(normalized=normalized)
    trainer(device, callbacks=list(callbacks), **options).fit(model, images(), images())
    return model


def clouds(n: int = 96, dim: int = 2) -> tuple[Tensor, Tensor]:
    """Return samples of two normal distributions."""
    generator = torch.Generator().manual_seed(7)
    source, target = torch.randn(2, n, dim, generator=generator, device="cpu")
    return source, target * torch.linspace(0.5, 2, dim, device="cpu") + 2


def samples(n: int = 96, dim: int = 2, **options: Any) -> SamplesDataModule:
    """Return batches of two clouds."""
    return SamplesDataModule(*clouds(n, dim), **{"batch_size": 32, "val_fraction": 0.25, **options})


def fit_map(device: str, data: SamplesDataModule | None = None, callbacks: Sequence[Callback] = (), **options: Any):
    """Return a map that has been trained for four updates; ``trainer=`` has the options of the trainer."""
    given = options.pop("trainer", {})
    seed_everything(0, verbose=False)
    # Few sweeps: on an emulated device each costs as much as a real one's thousand.
    model = MongeMap(**{"hidden": (16,), "tolerance": 1e-3, **options})
    trainer(device, callbacks=list(callbacks), **given).fit(model, datamodule=data or samples())
    return model


class Steps(Callback):
    """Counts what each training step costs, from the batch on the device to the update."""

    def __init__(self) -> None:
        self.counts: list[Counts] = []
        self._counting: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._counting = counting()
        self.counts.append(self._counting.__enter__())

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._counting.__exit__(None, None, None)
