"""Small regressions, trainers and schedules that the tests of the regime share."""

from functools import partial

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import FSDPStrategy
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR
from torch.utils.data import DataLoader, TensorDataset

SAMPLES, EPOCHS = 60, 6


def dataset(samples=SAMPLES):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 4, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True))


def loader(batch_size, samples=SAMPLES, **options):
    return DataLoader(dataset(samples), batch_size=batch_size, **options)


class Regression(LightningModule):
    """A linear regression whose schedulers are given; two groups, so that each has a learning rate of its own."""

    def __init__(self, schedule=None, *, interval="epoch", frequency=1, optimizer=None, lr=1e-3, **config):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.schedule, self.config = schedule, {"interval": interval, "frequency": frequency, **config}
        self.optimizer = optimizer or partial(torch.optim.SGD, momentum=0.9)
        self.lr = lr

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.layer(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.layer(batch[0])

    def configure_optimizers(self):
        groups = [{"params": [self.layer.weight]}, {"params": [self.layer.bias], "lr": self.lr / 2}]
        optimizer = self.optimizer(groups, lr=self.lr)
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), **self.config}}


class Trace(Callback):
    """The learning rates with which each update was made, and where validations fell."""

    def __init__(self):
        self.rates, self.validated = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append([float(group["lr"]) for group in optimizer.param_groups])

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.validated.append(trainer.global_step)

    @property
    def tensor(self):
        return torch.tensor(self.rates, dtype=torch.float64)


class SaveAt(Callback):
    """A checkpoint at one hook of every epoch, by the updates made."""

    def __init__(self, path, hook="on_train_epoch_end"):
        self.path, self.saved = path, []
        setattr(self, hook, self.save)

    def save(self, trainer, pl_module):
        if trainer.sanity_checking:
            return
        trainer.save_checkpoint(self.path / f"{trainer.global_step}.ckpt")
        self.saved.append(trainer.global_step)


def trainer_of(*callbacks, max_epochs=EPOCHS, **options):
    options = {"logger": False, "enable_checkpointing": False, **options}
    return Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        devices=options.pop("devices", 1),
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def run(module, data, *callbacks, ckpt_path=None, **options):
    seed_everything(0, verbose=False)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    trace = Trace()
    trainer = trainer_of(trace, *callbacks, **options)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer, trace


def sequential(optimizer, unit):
    warmup = schedulers.LinearLR(optimizer, start_factor=0.1, total_iters=2 * unit)
    cosine = schedulers.CosineAnnealingLR(optimizer, T_max=4 * unit, eta_min=1e-5)
    return schedulers.SequentialLR(optimizer, [warmup, cosine], milestones=[2 * unit])


def chained(optimizer, unit):
    constant = schedulers.ConstantLR(optimizer, factor=0.1, total_iters=2 * unit)
    return schedulers.ChainedScheduler([constant, schedulers.ExponentialLR(optimizer, gamma=0.9 ** (1 / unit))])


# Each scheduler of torch for six epochs, in steps of which an epoch has `unit`.
SCHEDULES = {
    "StepLR": lambda o, unit: schedulers.StepLR(o, step_size=2 * unit, gamma=0.3),
    "MultiStepLR": lambda o, unit: schedulers.MultiStepLR(o, milestones=[unit, 4 * unit], gamma=0.1),
    "ExponentialLR": lambda o, unit: schedulers.ExponentialLR(o, gamma=0.8 ** (1 / unit)),
    "CosineAnnealingLR": lambda o, unit: schedulers.CosineAnnealingLR(o, T_max=6 * unit, eta_min=1e-4),
    "CosineAnnealingWarmRestarts": lambda o, unit: schedulers.CosineAnnealingWarmRestarts(
        o, T_0=2 * unit, T_mult=2, eta_min=1e-4
    ),
    "LinearLR": lambda o, unit: schedulers.LinearLR(o, start_factor=0.2, total_iters=4 * unit),
    "ConstantLR": lambda o, unit: schedulers.ConstantLR(o, factor=0.2, total_iters=3 * unit),
    "PolynomialLR": lambda o, unit: schedulers.PolynomialLR(o, total_iters=6 * unit, power=2.0),
    "LambdaLR": lambda o, unit: schedulers.LambdaLR(o, lr_lambda=lambda step: 1 / (1 + step / unit)),
    "MultiplicativeLR": lambda o, unit: schedulers.MultiplicativeLR(o, lr_lambda=lambda step: 1 - 0.1 / unit),
    "CyclicLR": lambda o, unit: schedulers.CyclicLR(
        o, base_lr=1e-4, max_lr=1e-3, step_size_up=2 * unit, mode="triangular2"
    ),
    "OneCycleLR": lambda o, unit: schedulers.OneCycleLR(o, max_lr=1e-2, total_steps=6 * unit),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    "SWALR": lambda o, unit: SWALR(o, swa_lr=5e-4, anneal_epochs=3 * unit),
}
EPOCH_SCHEDULES = {name: partial(schedule, unit=1) for name, schedule in SCHEDULES.items()}


def sharded(trainer):
    """Give a trainer a strategy that this machine may have no device for."""
    trainer._accelerator_connector.strategy = FSDPStrategy()
    return trainer


class Tunable(Regression):
    def __init__(self):
        super().__init__(lr=1e-3)
        self.batch_size = 2
        self.learning_rate = 1e-3

    def train_dataloader(self):
        return loader(self.batch_size)

    def val_dataloader(self):
        return loader(30)


class Listed(Regression):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch[0] if isinstance(batch[0], (list, tuple)) else batch, batch_idx)
