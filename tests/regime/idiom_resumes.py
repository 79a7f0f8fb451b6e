"""Runs of the idioms' scripts that are cut at any update and resumed: bit for bit the run that was not."""

from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from idiom_scripts import Script, quiet, script
from lightning.pytorch.callbacks import ModelCheckpoint
from regime_idioms import INTERVALS, SHARES, Batches, Cell
from regime_runs import Trace
from torch.utils.data import DataLoader

from lightning_gap import LargeBatchRegime

# Constants, and lengths that are asked for again when the run is resumed.
LENGTHS = {
    "step": ("the updates, a constant", "estimated_stepping_batches", "max_epochs * len(self.train_dataloader())"),
    "epoch": ("the epochs, a constant", "trainer.max_epochs", "trainer.max_epochs in setup"),
}


class Resumable(DataLoader[Any]):
    """A loader that goes on with the batch after the last one that it gave before the checkpoint."""

    given = passed_over = 0

    def __iter__(self) -> Iterator[Any]:
        behind, self.passed_over = self.passed_over, 0
        for at, batch in enumerate(super().__iter__(), start=1):
            if at > behind:
                self.given = at
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.passed_over = state["given"]


def train(cell: Cell, save: Path | None = None, ckpt_path: Path | None = None) -> tuple[Script, Trace]:
    regime: list[Any] = [LargeBatchRegime(cell.batches.reference, train_longer=cell.share)]
    if save is not None:
        regime.append(ModelCheckpoint(save, filename="{step}", every_n_train_steps=1, save_top_k=-1))
    with quiet():
        module, trainer, trace, data = script(*cell[:3], cell.batches, *regime, loader=Resumable)
        trainer.fit(module, **data, ckpt_path=ckpt_path)
    return module, trace


def different_resumes(cell: Cell, folder: Path, points: int, seed: int) -> tuple[list[int], int]:
    """Resume a cell from random updates; return those from which a rate or a weight differs, and the run's updates."""
    module, full = train(cell, save=folder)
    updates = len(full.rates)
    generator = torch.Generator().manual_seed(seed)
    wrong = []
    for update in sorted((torch.randperm(updates - 1, generator=generator)[:points] + 1).tolist()):
        part, trace = train(cell, ckpt_path=folder / f"step={update}.ckpt")
        same = all(torch.equal(a, b) for a, b in zip(module.parameters(), part.parameters(), strict=True))
        if trace.rates != full.rates[update:] or not same:
            wrong.append(update)
    return wrong, updates


def cells_to_resume(names: Iterable[str]) -> list[Cell]:
    """Return every schedule at every share, once by epochs and once by updates, over batches and idioms."""
    batches = (Batches(2, 8), Batches(5, 16, 3), Batches(2, 4, 2), Batches(3, 64))
    return [
        Cell(name, interval, LENGTHS[interval][(of + at) % 3], share, batches[(of + at // 2) % 4])
        for of, name in enumerate(names)
        for at, (share, interval) in enumerate(product(SHARES, INTERVALS))
    ]
