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
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regime_runs import Trace, dataset, trainer_of
from torch.utils.data import DataLoader

from lightning_gap import LargeBatchRegime

INTERVALS = ("epoch", "step")
SHARES = (0.0, 0.1, 0.5, 1.0)
TOLERANCE = 1e-6  # of the largest rate


class Batches(NamedTuple):
    """The batch of the reference run, the loader's batch and the accumulation of the run beside it, and the data."""

    reference: int
    loader: int
    accumulate: int = 1
    samples: int = 74
    epochs: int = 6

    @property
    def ratio(self) -> float:
        return self.loader * self.accumulate / self.reference

    @property
    def updates(self) -> tuple[int, int]:
        """The updates of one epoch, of the reference run and of this run."""
        batches = math.ceil(self.samples / self.loader)
        return math.ceil(self.samples / self.reference), math.ceil(batches / self.accumulate)

    @property
    def alone(self) -> "Batches":
        """Those of the reference run."""
        return self._replace(loader=self.reference, accumulate=1)


# Small enough to be run to the end, hundreds of times.
SMALL = (
    Batches(2, 3),
    Batches(2, 8),
    Batches(2, 64),
    Batches(2, 4, 2),
    Batches(5, 16, 3),
    Batches(3, 12),
    Batches(8, 4),
)
# As people train: whether a length is this run's can be told where it is not one of a dozen updates.
REAL = (
    Batches(128, 4096, samples=50_000, epochs=30),
    Batches(128, 512, samples=50_000, epochs=60),
    Batches(64, 96, samples=50_000, epochs=20),
    Batches(64, 256, 4, samples=60_000, epochs=15),
    Batches(100, 1000, samples=50_000, epochs=40),
    Batches(16, 128, samples=3_668, epochs=3),
    Batches(32, 48, samples=10_000, epochs=12),
)


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
        asks: Whether the trainer or the loader is asked within ``fit``, or the reference run's constants are written
            down. If not, nothing but its number tells a length of this run.
    """

    epochs: Callable[[Any], int] | None = None
    updates: Callable[[Any], int] | None = None
    total: Callable[[Any], int] | None = None
    when: str = "configure"
    data: str = "fit"
    limit: str = "max_epochs"
    asks: bool = True

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
    return m.batches.epochs


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
    "the updates, a constant": Idiom(total=lambda m: m.batches.epochs * m.batches.updates[0]),
    "epochs= and steps_per_epoch=, constants": Idiom(_constant_epochs, lambda m: m.batches.updates[0]),
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
    "len(dataset) // batch_size * epochs": Idiom(_constant_epochs, _floor, asks=False),
    "len(dataset) // (loader.batch_size * accumulation * devices) * max_epochs": Idiom(
        total=_recipe, data="module", asks=False
    ),
    "len(loader) * epochs before fit": Idiom(_constant_epochs, _held, when="before", asks=False),
    "len(loader) // accumulation * epochs before fit": Idiom(
        _constant_epochs, lambda m: max(1, _held(m) // m.accumulate), when="before", asks=False
    ),
    "len(dataset) // batch_size * epochs before fit": Idiom(_constant_epochs, _floor, when="before", asks=False),
    "ceil(len(dataset) / batch_size) * epochs before fit": Idiom(_constant_epochs, _ceil, when="before", asks=False),
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


def every_cell(batches: Sequence[Batches] = SMALL[:3], *, asking: bool = True) -> list[Cell]:
    """Every script at every share and batch; of ``asking``, only those that ask for lengths, or write constants."""
    return [
        Cell(*each, share, batch)
        for each in scripts()
        if IDIOMS[each[2]].asks or not asking
        for share in SHARES
        for batch in batches
    ]


def balanced_cells(batches: Sequence[Batches] = SMALL, *, asking: bool = True) -> list[Cell]:
    """Every script once, so that each scheduler and each idiom meets every share, and every batch."""
    names, idioms, found = list(schedulers()), list(IDIOMS), []
    for name, interval, idiom in scripts():
        if IDIOMS[idiom].asks or not asking:
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


class WarmUp(Script):
    """Sets the rates of its first updates by itself, as Lightning's documentation shows."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        if self.trainer.global_step < 20:
            for group in optimizer.param_groups:
                group["lr"] = RATE * (self.trainer.global_step + 1) / 20


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
    kind = WarmUp if name == "warm-up in optimizer_step" else Script
    module = kind(name, interval, idiom, batches, loader)
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
