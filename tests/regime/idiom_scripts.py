"""The scripts of the idioms, run by a real Trainer with LargeBatchRegime and without, and what comes of it.

``outcome`` runs a cell to its end, and says whether every rate is the factor times the reference run's, or whether the
run was refused before its first update. ``start`` runs it up to its first batch. Everything else is a defect.
"""

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

import torch
from idiom_schedules import LAZY, RATE, Length, numbered, schedulers
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regime_idioms import IDIOMS, Batches
from regime_runs import Trace, dataset, trainer_of
from torch.utils.data import DataLoader

from lightning_gap import LargeBatchRegime

TOLERANCE = 1e-6  # of the largest rate


class Script(LightningModule):
    """What a user writes: a linear regression, two groups of parameters, one scheduler sized by an idiom."""

    def __init__(
        self,
        name: str,
        interval: str,
        idiom: str,
        batches: Batches,
        loader: type[DataLoader[Any]] = DataLoader,
    ) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        self.name, self.interval, self.idiom = name, interval, IDIOMS[idiom]
        self.batches, self.kind = batches, loader
        self.batch_size, self.accumulate = batches.loader, batches.accumulate
        self.loader = self.new_loader()
        self.length: Length | None = self.idiom.length(self) if self.idiom.when == "before" else None
        if self.idiom.data == "module":
            self.train_dataloader = self.new_loader
        if numbered(name):
            self.lr_scheduler_step = self.tell_epoch if interval == "epoch" else self.tell_update
        elif name.endswith("lr_scheduler_step overridden"):
            self.lr_scheduler_step = self.step_scheduler

    def new_loader(self) -> DataLoader[Any]:
        return self.kind(data_of(self.batches.samples), batch_size=self.batch_size)

    def setup(self, stage: str) -> None:
        if self.idiom.when == "setup":
            self.length = self.idiom.length(self)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        groups = [{"params": [self.layer.weight]}, {"params": [self.layer.bias], "lr": RATE / 2}]
        optimizer = torch.optim.SGD(groups, lr=RATE, momentum=0.9)
        if self.idiom.when == "step":
            scheduler = LAZY[self.name](optimizer, lambda: self.idiom.length(self).total)
        else:
            self.length = self.length or self.idiom.length(self)
            scheduler = schedulers()[self.name](optimizer, self.length)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}

    def step_scheduler(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()

    def tell_epoch(self, scheduler: Any, metric: Any) -> None:
        scheduler.step(epoch=self.current_epoch)

    def tell_update(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(num_updates=self.global_step)


class Data(LightningDataModule):
    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(data_of(self.batches.samples), batch_size=self.batches.loader)


data_of = cache(dataset)


@contextlib.contextmanager
def quiet() -> Iterator[list[warnings.WarningMessage]]:
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            yield told
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def script(
    name: str, interval: str, idiom: str, batches: Batches, *callbacks: Any, loader: type[DataLoader[Any]] = DataLoader
) -> tuple[Script, Trainer, Trace, dict[str, Any]]:
    """Return the module of a script, its trainer, not yet run, what will trace its rates, and its data for ``fit``.

    Without callbacks it is the reference run.
    """
    batches = batches if callbacks else batches.alone
    module = Script(name, interval, idiom, batches, loader)
    its = IDIOMS[idiom]
    limit: dict[str, Any] = {"max_epochs": batches.epochs}
    if its.limit == "max_steps":
        limit = {"max_epochs": -1, "max_steps": batches.epochs * batches.updates[0]}
    trace = Trace()
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = trainer_of(
        trace, *callbacks, accumulate_grad_batches=batches.accumulate, enable_checkpointing=saves, **limit
    )
    data = {"fit": {"train_dataloaders": module.loader}, "datamodule": {"datamodule": Data(batches)}}.get(its.data, {})
    return module, trainer, trace, data


@cache
def reference_rates(name: str, interval: str, idiom: str, batches: Batches) -> torch.Tensor:
    """The rates of every group at every update of a run at the reference batch, without the callback."""
    with quiet():
        module, trainer, trace, data = script(name, interval, idiom, batches.alone)
        trainer.fit(module, **data)
    return trace.tensor


def expected_rates(name: str, interval: str, idiom: str, share: float, batches: Batches) -> torch.Tensor:
    """What the plan promises: the factor times the reference run's rates, read at the pace of this run."""
    reference = reference_rates(name, interval, idiom, batches.alone)
    there, here = batches.updates
    pace = there / (here + Fraction(str(share)) * (there - here))
    updates = math.ceil(len(reference) / pace)
    return math.sqrt(batches.ratio) * reference[[math.floor(pace * update) for update in range(updates)]]


class Outcome(NamedTuple):
    """``"equal"``, ``"refused"`` or ``"WRONG"``, and what there is to say of it."""

    word: str
    detail: str = ""
    error: float = 0.0


def outcome(name: str, interval: str, idiom: str, share: float, batches: Batches) -> Outcome:
    """Run a cell to its end, and compare every rate."""
    trace, refusal, told = run(name, interval, idiom, share, batches)
    if refusal is not None:
        return refusal
    expected = expected_rates(name, interval, idiom, share, batches)
    if len(trace.rates) != len(expected):
        return Outcome("WRONG", f"{len(trace.rates)} updates for {len(expected)}{told}", math.inf)
    error = float((trace.tensor - expected).abs().max() / expected.max())
    if error > TOLERANCE:
        return Outcome("WRONG", f"a rate off by {error:.2g} of the largest{told}", error)
    return Outcome("equal", error=error)


def start(name: str, interval: str, idiom: str, share: float, batches: Batches) -> Outcome:
    """Run a cell up to its first batch: if it is not refused, its schedule must have the reference run's length."""
    begin = Begin()
    _, refusal, told = run(name, interval, idiom, share, batches, begin)
    if refusal is not None:
        return refusal
    here, there = begin.length, reference_length(name, interval, idiom, batches.alone)
    return Outcome("equal") if here == there else Outcome("WRONG", f"{here} for {there}{told}", math.inf)


class Begin(Callback):
    """Ends a run when its first batch would start, and keeps the length that the script has found."""

    class Begun(Exception):
        pass

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.length = pl_module.length
        raise self.Begun


@cache
def reference_length(name: str, interval: str, idiom: str, batches: Batches) -> Length | None:
    """The length that a script finds where nothing runs but the reference run."""
    with quiet():
        module, trainer, _, data = script(name, interval, idiom, batches.alone)
    trainer.callbacks.append(begin := Begin())
    with quiet(), contextlib.suppress(Begin.Begun):
        trainer.fit(module, **data)
    return begin.length


def run(
    name: str, interval: str, idiom: str, share: float, batches: Batches, *callbacks: Callback
) -> tuple[Trace, Outcome | None, str]:
    """Run a cell; return its rates, how it failed, and what it warned of."""
    with quiet() as warned:
        regime = LargeBatchRegime(batches.reference, train_longer=share)
        module, trainer, trace, data = script(name, interval, idiom, batches, regime, *callbacks)
        failure = None
        try:
            trainer.fit(module, **data)
        except Begin.Begun:
            pass
        except MisconfigurationException as error:
            failure = Outcome("refused" if not trace.rates else "WRONG", str(error))
        except Exception as error:
            failure = Outcome("WRONG", f"after {len(trace.rates)} updates, {type(error).__name__}: {error}", math.inf)
    told = next((f"; warned: {each.message}" for each in warned if "LargeBatchRegime" in str(each.message)), "")
    return trace, failure, told
