"""The picture of a map: what is drawn is where the samples go, and drawing changes nothing."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from logged_runs import trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_gap import MapFigure, MongeMap, SamplesDataModule
from lightning_gap.monge import plot_map
from lightning_gap.monge.figure import principal_plane

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure


def _drawn(*args, **options):
    ax = plot_map(*args, ax=Figure().add_subplot(), **options)
    return {line.get_label(): line for line in ax.lines}


def _pictures(folder):
    return sorted(path.name for path in Path(folder).rglob("figures/lightning_gap/monge/map/*.png"))


def test_each_sample_is_joined_to_its_image():
    x = np.random.default_rng(0).normal(size=(5, 2))
    ax = plot_map(x, x + 1, x, ax=Figure().add_subplot())
    joins = [line.get_xydata() for line in ax.lines if len(line.get_xdata()) == 2]
    assert len(joins) == 5
    np.testing.assert_allclose(np.stack(joins), np.stack([x, x + 1], 1))
    by_label = {line.get_label(): line.get_xydata() for line in ax.lines}
    np.testing.assert_allclose(by_label["images T(x)"], x + 1)
    np.testing.assert_allclose(by_label["target"], x)


def test_one_dimension_is_a_graph():
    x = np.array([[2.0], [0.0], [1.0]])
    np.testing.assert_allclose(_drawn(x, x**2, x)["T(x)"].get_xydata(), [[0, 0], [1, 1], [2, 4]])


def test_many_dimensions_are_drawn_along_the_largest_variance():
    rng = np.random.default_rng(0)
    target = rng.normal(size=(500, 5)) * [1, 9, 1, 4, 1]
    plane = principal_plane(target)
    assert np.abs(plane).argmax(0).tolist() == [1, 3]
    assert plane[1, 0] > 0.9
    np.testing.assert_allclose(_drawn(target, target, target)["target"].get_xydata(), target @ plane)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="must be"):
        plot_map(np.zeros((3, 2)), np.zeros((4, 2)), np.zeros((3, 2)), ax=None)


@pytest.mark.parametrize("points", [0, -1, 1.5, True])
def test_points_out_of_range_are_refused(points):
    with pytest.raises(ValueError, match="points must be a positive integer"):
        MapFigure(points=points)


def test_it_only_observes(tmp_path):
    def weights(*callbacks):
        torch.manual_seed(0)
        data = SamplesDataModule(torch.randn(60, 3), torch.randn(60, 3) + 2, batch_size=20)
        model = MongeMap(dim=3, hidden=(8,))
        run = trainer(tmp_path, CSVLogger(tmp_path), max_epochs=2, callbacks=list(callbacks))
        run.fit(model, data)
        return torch.cat([p.detach().flatten() for p in model.parameters()]), torch.get_rng_state()

    (plain, state), (observed, state_observed) = weights(), weights(MapFigure())
    assert plain.equal(observed)
    assert state.equal(state_observed)
    assert len(_pictures(tmp_path)) == 2


def test_sanity_checking_draws_nothing(tmp_path):
    data = SamplesDataModule(torch.randn(60, 2), torch.randn(60, 2), batch_size=20)
    only_sanity = {"num_sanity_val_steps": 1, "check_val_every_n_epoch": 2, "max_epochs": 1}
    run = trainer(tmp_path, CSVLogger(tmp_path), callbacks=[MapFigure()], **only_sanity)
    run.fit(MongeMap(dim=2, hidden=(8,)), data)
    assert _pictures(tmp_path) == []


class Batch(NamedTuple):
    source: Tensor
    target: Tensor
    condition: Tensor | None = None


class Shift(LightningModule):
    """Moves the samples of condition k by k."""

    def __init__(self):
        super().__init__()
        self.by = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, condition):
        assert condition.shape == (len(x),)
        return x + self.by * condition[:, None]

    def training_step(self, batch, batch_idx):
        return self.by.square()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_conditions_are_drawn_together(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("lightning_gap.monge.figure.plot_map", lambda *args, **options: seen.append(args) or _Axes())
    batch = Batch(torch.randn(3, 10, 2), torch.randn(3, 10, 2), torch.arange(3))
    loader = DataLoader([batch], batch_size=None)
    figure = MapFigure(points=6)
    trainer(tmp_path, CSVLogger(tmp_path), max_epochs=1, callbacks=[figure]).fit(Shift(), loader, loader)
    ((source, mapped, target),) = seen
    np.testing.assert_allclose(source, batch.source[:, :2].flatten(0, 1), rtol=1e-6)
    np.testing.assert_allclose((mapped - source)[:, 0], [0, 0, 1, 1, 2, 2], atol=1e-6)
    assert len(target) == 6


class _Axes:
    def set_title(self, *args, **options):
        pass
