"""The ways in which scripts size their schedules, and what LargeBatchRegime makes of each, against real reference runs.

A cell is a scheduler, how often it is stepped, where the script takes its lengths from, how much longer the run is to
train, and the batch. Its script is run twice by a real Trainer: at the reference batch without the callback, and at the
batch of the cell with it. ``outcome`` says whether every rate is the factor times the reference run's, or whether the
run was refused before its first update. Everything else is a defect.
"""

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

import torch
from idiom_schedules import LAZY, RATE, Length, numbered, schedulers
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regime_runs import Trace, dataset, trainer_of
from torch.utils.data import DataLoader

from lightning_gap import LargeBatchRegime

SAMPLES, EPOCHS = 74, 6
INTERVALS = ("epoch", "step")
SHARES = (0.0, 0.1, 0.5, 1.0)
TOLERANCE = 1e-6  # of the largest rate


class Batches(NamedTuple):
    """The batch of the reference run, and the loader's batch and the accumulation of the run beside it."""

    reference: int
    loader: int
    accumulate: int = 1

    @property
    def ratio(self) -> float:
        return self.loader * self.accumulate / self.reference

    @property
    def updates(self) -> tuple[int, int]:
        """The updates of one epoch, of the reference run and of this run."""
        batches = math.ceil(SAMPLES / self.loader)
        return math.ceil(SAMPLES / self.reference), math.ceil(batches / self.accumulate)


RATIOS = (Batches(2, 3), Batches(2, 8), Batches(2, 64))
BATCHES = (*RATIOS, Batches(2, 4, 2), Batches(5, 16, 3), Batches(3, 12), Batches(8, 4))


# --------------------------------------------------------------------------------------------------------- the idioms


@dataclass(frozen=True)
class Idiom:
    """Where a script takes its lengths from.

    Attributes:
        epochs: Its epochs, of the module; without it, only updates.
        updates: Its updates in one epoch, of the module; without it, only epochs. Of ``total``, it has them all.
        total: All of its updates, of the module.
        when: ``"before"`` fit, in ``"setup"``, in ``"configure"`` (``configure_optimizers``), or at every ``"step"``.
        data: Who gives the loader: ``"fit"``, the ``"module"`` or a ``"datamodule"``.
        limit: Whether the trainer is given ``max_epochs`` or ``max_steps``.
    """

    epochs: Callable[[Any], int] | None = None
    updates: Callable[[Any], int] | None = None
    total: Callable[[Any], int] | None = None
    when: str = "configure"
    data: str = "fit"
    limit: str = "max_epochs"

    def intervals(self) -> tuple[str, ...]:
        by_epoch = self.epochs is not None and self.updates is None and self.total is None
        return ("epoch",) if by_epoch else ("step",) if self.epochs is not None or self.total is not None else INTERVALS

    def length(self, module: "Script") -> Length:
        if module.interval == "epoch":
            assert self.epochs is not None
            return Length(self.epochs(module), per_epoch=0)
        if self.total is not None:
            return Length(self.total(module))
        assert self.epochs is not None
        assert self.updates is not None
        epochs, updates = self.epochs(module), self.updates(module)
        return Length(epochs * updates, epochs, updates)


def _constant_epochs(m: Any) -> int:
    return EPOCHS


def _trainer_epochs(m: Any) -> int:
    return m.trainer.max_epochs


def _all_updates(m: Any) -> int:
    return int(m.trainer.estimated_stepping_batches)


def _held(m: Any) -> int:
    return len(m.loader)


def _floor(m: Any) -> int:
    return len(m.loader.dataset) // (m.batch_size * m.accumulate)


def _ceil(m: Any) -> int:
    return math.ceil(len(m.loader.dataset) / (m.batch_size * m.accumulate))


def _recipe(m: Any) -> int:
    """The recipe for all updates that was passed on before ``estimated_stepping_batches``."""
    loader = m.train_dataloader()
    batch = loader.batch_size * m.trainer.accumulate_grad_batches * max(1, m.trainer.num_devices)
    return len(loader.dataset) // batch * m.trainer.max_epochs


def _counted(m: Any) -> int:
    m.trainer.fit_loop.setup_data()
    return m.trainer.num_training_batches // m.trainer.accumulate_grad_batches


def _source(m: Any) -> int:
    return len(m.trainer.fit_loop._data_source.dataloader())


IDIOMS: dict[str, Idiom] = {
    # By epochs.
    "the epochs, a constant": Idiom(epochs=_constant_epochs),
    "trainer.max_epochs": Idiom(epochs=_trainer_epochs),
    "trainer.max_epochs in setup": Idiom(epochs=_trainer_epochs, when="setup"),
    "trainer.max_epochs at every step": Idiom(epochs=_trainer_epochs, when="step"),
    "estimated_stepping_batches // len(loader)": Idiom(
        epochs=lambda m: _all_updates(m) // (_held(m) // m.trainer.accumulate_grad_batches)
    ),
    # By updates.
    "the updates, a constant": Idiom(total=lambda m: EPOCHS * m.reference_updates),
    "epochs= and steps_per_epoch=, constants": Idiom(_constant_epochs, lambda m: m.reference_updates),
    "estimated_stepping_batches": Idiom(total=_all_updates),
    "estimated_stepping_batches, data of the module": Idiom(total=_all_updates, data="module"),
    "estimated_stepping_batches, datamodule": Idiom(total=_all_updates, data="datamodule"),
    "estimated_stepping_batches in setup": Idiom(total=_all_updates, when="setup", data="module"),
    "estimated_stepping_batches at every step": Idiom(total=_all_updates, when="step"),
    "estimated_stepping_batches under max_steps": Idiom(total=_all_updates, limit="max_steps"),
    "trainer.max_steps": Idiom(total=lambda m: m.trainer.max_steps, limit="max_steps"),
    "max_epochs * len(loader held by the module)": Idiom(_trainer_epochs, _held),
    "max_epochs * len(self.train_dataloader())": Idiom(
        _trainer_epochs, lambda m: len(m.train_dataloader()), data="module"
    ),
    "max_epochs * len(datamodule.train_dataloader())": Idiom(
        _trainer_epochs, lambda m: len(m.trainer.datamodule.train_dataloader()), data="datamodule"
    ),
    "max_epochs * len(the trainer's own loader)": Idiom(_trainer_epochs, _source),
    "max_epochs * num_training_batches": Idiom(_trainer_epochs, _counted),
    "a constant * len(loader held by the module)": Idiom(_constant_epochs, _held),
    "max_epochs * len(loader) in setup": Idiom(_trainer_epochs, _held, when="setup"),
    "max_epochs * len(self.train_dataloader()) in setup": Idiom(
        _trainer_epochs, lambda m: len(m.train_dataloader()), when="setup", data="module"
    ),
    "len(dataset) // batch_size * epochs": Idiom(_constant_epochs, _floor),
    "len(dataset) // (loader.batch_size * accumulation * devices) * max_epochs": Idiom(total=_recipe, data="module"),
    "len(loader) * epochs before fit": Idiom(_constant_epochs, _held, when="before"),
    "len(loader) // accumulation * epochs before fit": Idiom(
        _constant_epochs, lambda m: max(1, _held(m) // m.accumulate), when="before"
    ),
    "len(dataset) // batch_size * epochs before fit": Idiom(_constant_epochs, _floor, when="before"),
    "ceil(len(dataset) / batch_size) * epochs before fit": Idiom(_constant_epochs, _ceil, when="before"),
}


class Cell(NamedTuple):
    """One script, how much longer it trains, and its batch."""

    name: str
    interval: str
    idiom: str
    share: float
    batches: Batches


def scripts() -> Iterator[tuple[str, str, str]]:
    """Yield every scheduler and interval with every idiom that they can be written in."""
    for idiom, its in IDIOMS.items():
        for interval in its.intervals():
            for name in LAZY if its.when == "step" else schedulers():
                yield name, interval, idiom


def every_cell(batches: Sequence[Batches] = RATIOS) -> list[Cell]:
    """Every script with every share and batch."""
    return [Cell(*each, share, batch) for each in scripts() for share in SHARES for batch in batches]


def balanced_cells() -> list[Cell]:
    """Every script once, so that each scheduler and each idiom meets every share, and every batch."""
    names, idioms, batches = list(schedulers()), list(IDIOMS), BATCHES
    found = []
    for name, interval, idiom in scripts():
        at = 3 * names.index(name) + 5 * idioms.index(idiom)  # 4 shares and 7 batches: coprime
        found.append(Cell(name, interval, idiom, SHARES[at % len(SHARES)], batches[at % len(batches)]))
    return found


# -------------------------------------------------------------------------------------------------------- the scripts


class Script(LightningModule):
    """What a user writes: a linear regression, two groups of parameters, one scheduler sized by an idiom."""

    def __init__(
        self,
        name: str,
        interval: str,
        idiom: str,
        batch_size: int,
        accumulate: int,
        reference: int,
        loader: type[DataLoader[Any]] = DataLoader,
    ) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        self.name, self.interval, self.idiom = name, interval, IDIOMS[idiom]
        self.batch_size, self.accumulate, self.kind = batch_size, accumulate, loader
        self.reference_updates = math.ceil(SAMPLES / reference)
        self.loader = self.new_loader()
        self.length = self.idiom.length(self) if self.idiom.when == "before" else None
        if self.idiom.data == "module":
            self.train_dataloader = self.new_loader
        if numbered(name):
            self.lr_scheduler_step = self.tell_epoch if interval == "epoch" else self.tell_update
        elif name.endswith("lr_scheduler_step overridden"):
            self.lr_scheduler_step = self.step_scheduler
        elif name == "warm-up in optimizer_step":
            self.optimizer_step = self.warm_up

    def new_loader(self) -> DataLoader[Any]:
        return self.kind(dataset(SAMPLES), batch_size=self.batch_size)

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
            scheduler = schedulers()[self.name](optimizer, self.length or self.idiom.length(self))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}

    def step_scheduler(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()

    def warm_up(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        optimizer.step(closure=closure)
        if self.trainer.global_step < 20:
            for group in optimizer.param_groups:
                group["lr"] = RATE * (self.trainer.global_step + 1) / 20

    def tell_epoch(self, scheduler: Any, metric: Any) -> None:
        scheduler.step(epoch=self.current_epoch)

    def tell_update(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(num_updates=self.global_step)


class Data(LightningDataModule):
    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(SAMPLES), batch_size=self.batch_size)


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
    batch, accumulate = (batches.loader, batches.accumulate) if callbacks else (batches.reference, 1)
    module = Script(name, interval, idiom, batch, accumulate, batches.reference, loader)
    its = IDIOMS[idiom]
    limit: dict[str, Any] = {"max_epochs": EPOCHS}
    if its.limit == "max_steps":
        limit = {"max_epochs": -1, "max_steps": EPOCHS * module.reference_updates}
    trace = Trace()
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = trainer_of(trace, *callbacks, accumulate_grad_batches=accumulate, enable_checkpointing=saves, **limit)
    data = {"fit": {"train_dataloaders": module.loader}, "datamodule": {"datamodule": Data(batch)}}.get(its.data, {})
    return module, trainer, trace, data


@cache
def reference_rates(name: str, interval: str, idiom: str, reference: int) -> torch.Tensor:
    """The rates of every group at every update of a run at the reference batch, without the callback."""
    with quiet():
        module, trainer, trace, data = script(name, interval, idiom, Batches(reference, reference))
        trainer.fit(module, **data)
    return trace.tensor


def expected_rates(name: str, interval: str, idiom: str, share: float, batches: Batches) -> torch.Tensor:
    """What the plan promises: the factor times the reference run's rates, read at the pace of this run."""
    reference = reference_rates(name, interval, idiom, batches.reference)
    there, here = batches.updates
    stretched = here + Fraction(str(share)) * (there - here)
    pace = there / stretched
    updates = math.ceil(len(reference) / pace)
    return math.sqrt(batches.ratio) * reference[[math.floor(pace * update) for update in range(updates)]]


class Outcome(NamedTuple):
    """``"equal"``, ``"refused"`` or ``"WRONG"``, and what there is to say of it."""

    word: str
    detail: str = ""
    error: float = 0.0


def outcome(name: str, interval: str, idiom: str, share: float, batches: Batches, **options: Any) -> Outcome:
    """Run a cell, and compare."""
    expected = expected_rates(name, interval, idiom, share, batches)
    trace = Trace()
    with quiet() as told:
        regime = LargeBatchRegime(batches.reference, train_longer=share, **options)
        try:
            module, trainer, trace, data = script(name, interval, idiom, batches, regime)
            trainer.fit(module, **data)
        except MisconfigurationException as error:
            if not trace.rates:
                return Outcome("refused", str(error))
            return Outcome("WRONG", f"after {len(trace.rates)} updates: {error}", math.inf)
        except Exception as error:
            return Outcome("WRONG", f"after {len(trace.rates)} updates, {type(error).__name__}: {error}", math.inf)
    warned = next((f"; warned: {w.message}" for w in told if "LargeBatchRegime" in str(w.message)), "")
    if len(trace.rates) != len(expected):
        return Outcome("WRONG", f"{len(trace.rates)} updates for {len(expected)}{warned}", math.inf)
    error = float((trace.tensor - expected).abs().max() / expected.max())
    if error > TOLERANCE:
        return Outcome("WRONG", f"a rate off by {error:.2g} of the largest{warned}", error)
    return Outcome("equal", error=error)
