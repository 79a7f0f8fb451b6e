"""MapFigure: every logger gets the figure, on rank zero, and the run does not know of it."""

import csv
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from gloo import enter_world, free_port, leave_world, start_processes
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.mlflow import _MLFLOW_AVAILABLE
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gap import MongeMap, SamplesDataModule
from lightning_gap.monge import MapFigure, figure

pytest.importorskip("matplotlib")


def samples(batch_size: int = 32) -> SamplesDataModule:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(80, 2, generator=generator), torch.randn(70, 2, generator=generator) + 2
    return SamplesDataModule(x, y, batch_size=batch_size, val_fraction=0.25)


def trainer(*callbacks, **options) -> Trainer:
    quiet = {"accelerator": "cpu", "enable_checkpointing": False, "enable_progress_bar": False, "logger": False,
             "enable_model_summary": False, "max_epochs": 1, "log_every_n_steps": 1}  # fmt: skip
    return Trainer(**{**quiet, "callbacks": list(callbacks), **options})


def model(**options) -> MongeMap:
    torch.manual_seed(0)
    return MongeMap(**{"dim": 2, "hidden": (8,), **options})


def points(callback: MapFigure) -> list[np.ndarray]:
    """Source, target and images in the figure's first panel."""
    from matplotlib.collections import PathCollection

    axes = callback.figure.subfigs[0].axes[0]
    return [np.asarray(c.get_offsets()) for c in axes.collections if isinstance(c, PathCollection)]


class Numbers(Logger):
    """Takes what every logger must."""

    name, version = "numbers", 0

    def log_metrics(self, metrics, step=None): ...

    def log_hyperparams(self, params): ...


class Steps(type("TensorBoardLogger", (Numbers,), {})):
    """Takes figures as TensorBoard does, and keeps their steps."""

    def __init__(self) -> None:
        super().__init__()
        self.experiment, self.steps, self.keys = self, [], set()

    def add_figure(self, key, figure, step, close):
        self.steps.append(step)
        self.keys.add(key)


@pytest.fixture
def drawn(monkeypatch):
    """What was to be drawn, in place of drawing it."""
    calls = []
    monkeypatch.setattr(figure, "plot_map", lambda *sets, **options: calls.append((sets, options)) or object())
    return calls


def test_it_draws_the_held_out_samples_and_their_images():
    callback, data, net = MapFigure(), samples(), model()
    trainer(callback).fit(net, data)
    held_out = next(iter(data.val_dataloader()))
    source, target, images = points(callback)
    np.testing.assert_allclose(source, held_out.source, rtol=1e-6)
    np.testing.assert_allclose(target, held_out.target, rtol=1e-6)
    np.testing.assert_allclose(images, net.transport(held_out.source), rtol=1e-5, atol=1e-6)
    assert callback.figure._suptitle.get_text() == "validation after 1 updates"


def test_every_n_validations_and_never_at_the_sanity_check(drawn):
    logger = Steps()
    trainer(MapFigure(2), logger=logger, max_epochs=5).fit(model(), samples())
    assert logger.steps == [1, 3, 5]
    assert logger.keys == {"lightning_gap/monge/map"}


def test_a_resumed_run_goes_on_counting(tmp_path, drawn):
    first = trainer(MapFigure(2), max_epochs=3)
    first.fit(model(), samples())
    first.save_checkpoint(tmp_path / "three.ckpt")
    logger = Steps()
    resumed = trainer(MapFigure(2), logger=logger, max_epochs=6)
    resumed.fit(model(), samples(), ckpt_path=tmp_path / "three.ckpt", weights_only=True)
    assert logger.steps == [5]


def test_trainer_validate_draws_too(drawn):
    trainer(MapFigure()).validate(model(), samples(), verbose=False)
    assert len(drawn) == 1


def test_samples_of_ones_own():
    x, y = np.linspace(-1, 1, 40).reshape(20, 2), np.zeros((5, 2))
    callback, net = MapFigure(samples=(x, y)), model()
    trainer(callback).fit(net, samples())
    source, target, images = points(callback)
    np.testing.assert_allclose(source, x)
    np.testing.assert_allclose(target, y)
    np.testing.assert_allclose(images, net.transport(x), rtol=1e-5, atol=1e-6)


class Batch(NamedTuple):
    source: Tensor
    target: Tensor
    source_weights: Tensor | None = None
    target_weights: Tensor | None = None
    condition: Tensor | None = None


class Shifts(nn.Module):
    conditional = True

    def forward(self, x, condition):
        return x + condition[:, None].to(x.dtype)


class Conditional(MongeMap):
    """Validates batches of conditions, as far as drawing is concerned."""

    def forward(self, x, condition=None):
        return self.map(x, condition)

    def validation_step(self, batch, batch_idx): ...


def test_conditions_are_panels_by_name_without_the_rows_that_fill_up(drawn):
    x, y = torch.randn(2, 6, 2), torch.randn(2, 4, 2)
    weights = torch.full((2, 6), 1 / 6)
    weights[1] = torch.tensor([0.5, 0.5, 0, 0, 0, 0])
    batches = [
        Batch(x, y, weights, None, torch.tensor([2, 0])),
        Batch(x[:1], y[:1], None, None, torch.tensor([2])),
    ]
    net = Conditional(map=Shifts())
    net.condition_names = ["control", "drug", "other"]
    trainer(MapFigure()).validate(net, DataLoader(batches, batch_size=None), verbose=False)
    ((source, mapped, target), options) = drawn[0]
    assert options["conditions"] == ["control", "other"]
    torch.testing.assert_close(source[0], x[1, :2])
    torch.testing.assert_close(mapped[0], x[1, :2])
    torch.testing.assert_close(source[1], torch.cat([x[0], x[0]]))
    torch.testing.assert_close(mapped[1], source[1] + 2)
    torch.testing.assert_close(target[1], torch.cat([y[0], y[0]]))


def test_standardized_features_are_drawn_as_they_were(drawn):
    class Standardized(nn.Module):
        components = None

        def decode(self, z):
            return 10 * z + 1

    net = model()
    net.representation = Standardized()
    x = torch.randn(20, 2)
    loader = DataLoader([(x, x + 1)], batch_size=None)
    trainer(MapFigure()).validate(net, loader, verbose=False)
    torch.testing.assert_close(drawn[0][0][0], 10 * x + 1)
    net.representation.components = torch.eye(2)
    trainer(MapFigure()).validate(net, loader, verbose=False)
    torch.testing.assert_close(drawn[1][0][0], x)


def test_at_most_so_many_points_are_mapped(drawn):
    data = samples()
    trainer(MapFigure(max_points=7)).validate(model(), data, verbose=False)
    assert [len(x) for x in drawn[0][0]] == [7, 7, 7]


def test_a_run_does_not_know_that_it_is_drawn():
    def run(*callbacks):
        seed_everything(3)
        net = model(map=nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, 2)))
        trainer(*callbacks, max_epochs=3).fit(net, samples())
        return net.state_dict(), torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002

    (one, rng, numpy), (other, other_rng, other_numpy) = run(), run(MapFigure())
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert torch.equal(rng, other_rng)
    assert np.array_equal(numpy, other_numpy)


# --- loggers ------------------------------------------------------------------------------------------------------


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    trainer(MapFigure(arrows=5), logger=logger, max_epochs=2).fit(model(), samples())
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir).Reload()
    assert [event.step for event in events.Images("lightning_gap/monge/map")] == [1, 2]


def test_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True, mode="offline")
    trainer(MapFigure(arrows=5), logger=logger).fit(model(), samples())
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    assert summary["lightning_gap/monge/map"]["count"] == 1
    assert list(tmp_path.rglob("media/images/lightning_gap/monge/*.png"))


@pytest.mark.parametrize("several", [False, True])
def test_csv_has_a_png_in_its_folder(tmp_path, several):
    logger = CSVLogger(tmp_path)
    loggers = [logger, Steps()] if several else logger
    trainer(MapFigure(arrows=5), logger=loggers).fit(model(), samples())
    (image,) = tmp_path.rglob("*.png")
    assert str(image) == f"{logger.log_dir}/figures/lightning_gap/monge/map/00000001.png"
    assert image.read_bytes().startswith(b"\x89PNG")
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv") as file:
        assert "lightning_gap/monge/val_loss" in next(csv.reader(file))
    assert not several or loggers[1].steps == [1]


@pytest.mark.skipif(not _MLFLOW_AVAILABLE, reason="MLflow is not installed")
def test_mlflow(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("maps", tracking_uri=f"file:{tmp_path}")
    trainer(MapFigure(arrows=5), logger=logger).fit(model(), samples())
    logged = logger.experiment.list_artifacts(logger.run_id, "figures/lightning_gap/monge/map")
    assert [artifact.path for artifact in logged] == ["figures/lightning_gap/monge/map/00000001.png"]


def test_a_logger_that_takes_nothing_is_named(drawn):
    class Deaf(Numbers): ...

    with pytest.warns(UserWarning, match="MapFigure: Deaf takes no figures"):
        trainer(MapFigure(), logger=Deaf()).fit(model(), samples())


def test_batches_that_are_no_pairs_are_named(drawn):
    class Other(MongeMap):
        def validation_step(self, batch, batch_idx): ...

    with pytest.warns(UserWarning, match=r"draws batches \(source, target\), and validation has others: give samples="):
        trainer(MapFigure()).validate(Other(2), DataLoader(torch.zeros(4, 2), batch_size=2), verbose=False)
    assert drawn == []


def test_arguments():
    with pytest.raises(ValueError, match="every_n_validations must be at least 1, got 0"):
        MapFigure(0)
    with pytest.raises(TypeError, match=r"samples must be \(source, target\)"):
        MapFigure(samples=torch.zeros(3, 2))


def _process(rank, port, folder, results):
    enter_world(rank, 2, port)
    callback = MapFigure(arrows=5)
    strategy = DDPStrategy(process_group_backend="gloo")
    run = trainer(callback, logger=CSVLogger(folder, version=0), devices=2, strategy=strategy)
    net = model()
    run.fit(net, samples(16))
    results[rank] = (callback.figure is not None, next(net.map.parameters()).tolist())
    leave_world()


@pytest.mark.distributed
def test_of_two_processes_the_first_draws(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        start_processes(_process, (free_port(), tmp_path, results), 2)
        results = dict(results)
    assert [results[rank][0] for rank in range(2)] == [True, False]
    assert results[0][1] == results[1][1]
    assert len(list(tmp_path.rglob("*.png"))) == 1


def test_vectors_of_conditions_in_double_are_drawn():
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(40, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = ["low", "high"] * 20
    doses = {"low": 0.0, "high": 1.0}
    data = SamplesDataModule(x, y, batch_size=8, conditions=(labels, labels), condition_vectors=doses)
    drawing = MapFigure()
    trainer(drawing, num_sanity_val_steps=0).fit(model(dim=None), data)
    assert drawing.figure is not None
