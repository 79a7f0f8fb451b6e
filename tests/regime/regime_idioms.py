"""The ways in which scripts size their schedules, and the batches at which each is tried.

A cell is a scheduler, how often it is stepped, where the script takes its lengths from, how much longer the run is to
train, and the batch.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from idiom_schedules import LAZY, Length, schedulers

INTERVALS = ("epoch", "step")
SHARES = (0.0, 0.1, 0.5, 1.0)


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

    def length(self, module: Any) -> Length:
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


def every_cell(batches: Sequence[Batches] = SMALL[:3]) -> list[Cell]:
    """Every script that asks for its lengths, or writes constants, at every share and batch."""
    return [
        Cell(*each, share, batch) for each in scripts() if IDIOMS[each[2]].asks for share in SHARES for batch in batches
    ]


def balanced_cells(batches: Sequence[Batches] = SMALL, *, asks: bool = True) -> list[Cell]:
    """Every script once, so that each scheduler and each idiom meets every share, and every batch."""
    names, idioms, found = list(schedulers()), list(IDIOMS), []
    for name, interval, idiom in scripts():
        if IDIOMS[idiom].asks == asks:
            at = 3 * names.index(name) + 5 * idioms.index(idiom)  # 4 shares and 7 batches: coprime
            found.append(Cell(name, interval, idiom, SHARES[at % len(SHARES)], batches[at % len(batches)]))
    return found


def told_cells() -> list[Cell]:
    """Every script whose lengths only their numbers tell, at every real size."""
    return [
        cell._replace(batches=batches, share=SHARES[(at + of) % len(SHARES)])
        for of, cell in enumerate(balanced_cells(REAL, asks=False))
        for at, batches in enumerate(REAL)
    ]
