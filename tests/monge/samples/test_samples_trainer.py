"""The data module under a Trainer: resumed runs, several processes, and LightningCLI."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import IterableDataset

from lightning_gap import SamplesDataModule

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Rows(LightningModule):
    """Takes a step an iteration, and remembers what it saw."""

    def __init__(self, estimate: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.estimate = estimate
        self.seen: list[tuple[int, int, list[list[float]]]] = []
        self.held_out: list[list[list[float]]] = []

    def training_step(self, batch, batch_idx):
        rows = torch.cat([batch.source, batch.target], dim=-1).tolist()
        self.seen.append((self.current_epoch, batch_idx, rows))
        return self.weight * batch.source.mean()

    def validation_step(self, batch, batch_idx):
        self.held_out.append([part.tolist() for part in (batch.source, batch.target, batch.target_again)])

    def configure_optimizers(self):
        if self.estimate:
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


class StopAt(Callback):
    """Ends the process's work in the middle of an epoch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Count(IterableDataset):
    def __iter__(self):
        for start in range(10**6):
            yield torch.arange(start * 3.0, start * 3 + 3)[:, None]


def numbered(kind: str, workers: int = 0) -> SamplesDataModule:
    x = torch.arange(60.0)[:, None]
    names = ["a", "b", "c"] * 20
    given = {
        "rows": ((x, x + 100), {}),
        "conditions": ((x, x + 100), {"conditions": (names, names), "conditions_per_batch": 2}),
        "samplers": ((lambda n, g: torch.rand(n, 1, generator=g), x), {"steps_per_epoch": 5}),
        "streams": ((Count(), x), {"steps_per_epoch": 5, "eval_batch_size": 8}),
    }[kind]
    return SamplesDataModule(*given[0], batch_size=4, num_workers=workers, seed=5, **given[1])


def run(data: SamplesDataModule, estimate: bool = False, checkpoint: str | None = None, **options) -> Rows:
    model = Rows(estimate)
    Trainer(**{**QUIET, "max_epochs": 3, "enable_checkpointing": False, **options}).fit(
        model, data, ckpt_path=checkpoint
    )
    return model


@pytest.mark.parametrize(
    ("kind", "workers", "estimate", "interval"),
    [
        ("rows", 0, False, 1.0),
        ("rows", 0, True, 0.5),
        ("rows", 1, False, 1.0),
        ("rows", 1, True, 0.5),
        ("conditions", 0, False, 0.5),
        ("samplers", 0, False, 0.5),
        ("streams", 0, False, 1.0),
    ],
)
@pytest.mark.parametrize("every", [1, 3])
def test_a_run_resumed_within_an_epoch_sees_what_the_uninterrupted_one_saw(
    kind, workers, estimate, interval, every, tmp_path
):
    whole = run(numbered(kind), val_check_interval=interval).seen
    steps = max(step for _, step, _ in whole) + 1
    stop = steps + 3  # in the second epoch
    saver = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=every, save_top_k=0)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(numbered(kind), callbacks=[saver, StopAt(stop)], enable_checkpointing=True, val_check_interval=interval)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < saved < stop
    resumed = run(numbered(kind, workers), estimate, str(tmp_path / "last.ckpt"), val_check_interval=interval).seen
    assert resumed == whole[saved:]


@pytest.mark.parametrize("save", ["validation", "epoch"])
def test_checkpoints_of_validations_and_epochs_resume_too(save, tmp_path):
    whole = run(numbered("rows"), val_check_interval=0.5).seen
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, save_on_train_epoch_end=save == "epoch", filename="{step}")
    run(numbered("rows"), val_check_interval=0.5, callbacks=[saver], enable_checkpointing=True)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) >= 3
    for path in paths:
        saved = torch.load(path, weights_only=True)["global_step"]
        assert run(numbered("rows"), checkpoint=str(path), val_check_interval=0.5).seen == whole[saved:]


class Glance(Callback):
    """Goes through the training loader in the middle of an epoch."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.lengths.append(len(list(trainer.train_dataloader)))


def test_an_observer_sees_the_whole_epoch_of_a_resumed_run(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1, save_top_k=0)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(numbered("rows"), callbacks=[saver, StopAt(4)], enable_checkpointing=True)
    glance = Glance()
    run(numbered("rows"), checkpoint=str(tmp_path / "last.ckpt"), callbacks=[glance])
    assert set(glance.lengths) == {len(numbered("rows").train_dataloader())}


class SaveRows(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        torch.save((pl_module.seen, pl_module.held_out), self.folder / f"{trainer.global_rank}.pt")


def joined(parts: list[list], dim: int) -> list:
    return torch.cat([torch.tensor(part) for part in parts], dim=dim).tolist()


@pytest.mark.distributed
@pytest.mark.parametrize(("kind", "devices"), [("rows", 2), ("rows", 4), ("conditions", 2), ("samplers", 2)])
def test_processes_see_together_what_one_sees(kind, devices, tmp_path):
    data, one = numbered(kind), run(numbered(kind))
    data.batch_size = 4 // devices
    run(data, strategy="ddp_fork", devices=devices, callbacks=[SaveRows(tmp_path)])
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(devices)]
    dim = -2
    for step, (epoch, index, rows) in enumerate(one.seen):
        parts = [seen[step] for seen, _ in ranks]
        assert all(part[:2] == (epoch, index) for part in parts)
        assert joined([part[2] for part in parts], dim) == rows
    for number, held_out in enumerate(one.held_out):
        for side in range(3):
            assert joined([held[number][side] for _, held in ranks], dim) == held_out[side]


@pytest.mark.distributed
def test_a_split_smaller_than_the_processes_is_refused():
    x = torch.arange(11.0)[:, None]
    with pytest.raises(Exception, match="the val split has 1 samples, fewer than the 2 processes that share them"):
        run(SamplesDataModule(x, x, batch_size=2), strategy="ddp_fork", devices=2)


@pytest.mark.distributed
def test_a_batch_that_the_processes_cannot_fill_is_refused():
    x = torch.arange(20.0)[:, None]
    with pytest.raises(Exception, match=r"batch_size=16 on 2 devices needs 32 samples .* has 18: use batch_size <= 9"):
        run(SamplesDataModule(x, x, batch_size=16), strategy="ddp_fork", devices=2)


def uniform(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(n, 2, generator=generator)


class Uniform:
    """A sampler with an argument, for configuration files."""

    def __init__(self, width: float = 1.0) -> None:
        self.width = width

    def __call__(self, n: int, generator: torch.Generator) -> torch.Tensor:
        return torch.rand(n, 2, generator=generator) * self.width


FILES = """
source: {folder}/cells.npz::x
target: {folder}/cells.npz::x
source_rows: {{treated: false}}
target_rows: {{treated: [true]}}
conditions: cell
groups: patient
val_groups: [107]
weights: [mass, null]
condition_vectors: {{B: [0.0, 1.0], T: [1.0, 0.0]}}
conditions_per_batch: 1
batch_size: 4
standardize: true
components: 2
val_fraction: null
"""
SAMPLERS = """
source: test_samples_trainer.uniform
target:
  class_path: test_samples_trainer.Uniform
  init_args: {width: 3.0}
batch_size: 8
steps_per_epoch: 7
"""
EXPLICIT = """
source: {folder}/x.npy
target: {folder}/x.npy
batch_size: 4
val: [{folder}/x.npy, {folder}/x.npy]
test: {{source: {folder}/x.npy, target: {folder}/x.npy, true_images: {folder}/x.npy}}
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    x = np.random.default_rng(0).normal(size=(48, 3)).astype(np.float32)
    patient, cell = np.repeat([101, 107], 24), np.array(["B", "B", "T", "T"] * 12)
    np.savez(tmp_path / "cells.npz", x=x, treated=np.arange(48) % 2 == 0, cell=cell, patient=patient, mass=np.ones(48))
    np.save(tmp_path / "x.npy", x)
    return tmp_path


@pytest.mark.parametrize("config", [FILES, SAMPLERS, EXPLICIT], ids=["files", "samplers", "explicit"])
@pytest.mark.parametrize("subclass", [False, True])
def test_a_configuration_file_makes_the_data_module(config, subclass, folder, monkeypatch):
    cli = pytest.importorskip("lightning.pytorch.cli")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    text = config.format(folder=folder) if config is not SAMPLERS else config
    lines = [f"      {line}" if subclass else f"  {line}" for line in text.strip().splitlines()]
    head = ["data:", "  class_path: lightning_gap.SamplesDataModule", "  init_args:"] if subclass else ["data:"]
    (folder / "config.yaml").write_text("\n".join([*head, *lines]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = cli.LightningCLI(
            Rows,
            None if subclass else SamplesDataModule,
            args=["--config", str(folder / "config.yaml")],
            subclass_mode_data=subclass,
            run=False,
            save_config_callback=None,
            trainer_defaults={**QUIET, "enable_checkpointing": False, "max_epochs": 1},
        )
    batch = next(iter(made.datamodule.train_dataloader()))
    if config is FILES:
        assert batch.source.shape == (1, 4, 2)
        assert batch.condition.shape == (1, 2)
        assert made.datamodule.condition_names == ("B", "T")
    elif config is SAMPLERS:
        assert len(made.datamodule.train_dataloader()) == 7
        assert 1 < float(batch.target.max()) <= 3
    else:
        assert torch.equal(
            *[getattr(next(iter(made.datamodule.test_dataloader())), x) for x in ("source", "true_images")]
        )
    made.trainer.fit(made.model, made.datamodule)
