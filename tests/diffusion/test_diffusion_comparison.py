"""A run beside its reference, and its figures and tables in the loggers."""

import math

import pytest
import torch
from diffusion_runs import KEY, Net, fit, read_csv
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_gap.diffusion import (
    UltraSlowDiffusion,
    forecast_updates,
    read_reference,
)


@pytest.fixture
def small_batch_run(tmp_path):
    """A run of 300 updates that travels as 1 + 0.5·log t, twice as fast as the ones below, and then drops its rate."""
    path = tmp_path / "small" / "diffusion.csv"
    path.parent.mkdir()
    lines = [f"{t},{0.1 if t <= 200 else 0.01},{1 + 0.5 * math.log(t)},33\n" for t in range(1, 301)]
    path.write_text("updates,learning_rate,distance,parameters\n" + "".join(lines))
    return path.parent


class Walk(LightningModule):
    """One weight that the optimizer moves along a + b·log t."""

    def __init__(self, intercept=0.5, slope=0.25):
        super().__init__()
        self.automatic_optimization = False
        self.intercept, self.slope = intercept, slope
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.weight.grad = self.weight.detach() - (self.intercept + self.slope * math.log(self.global_step + 1))
        optimizer.step()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_reference_is_laid_over_each_point(tmp_path, small_batch_run, capsys):
    diffusion, logger = UltraSlowDiffusion(reference=str(small_batch_run)), CSVLogger(tmp_path)
    with pytest.warns(UserWarning, match="measures 1 parameters here, and measured 33 in its reference"):
        run, _ = fit(tmp_path, diffusion, model=Walk(), logger=logger, max_steps=1000, max_epochs=-1)
    rows = {
        float(row[KEY + "updates"]): row for row in read_csv(f"{logger.log_dir}/metrics.csv") if row[KEY + "updates"]
    }
    assert float(rows[100][KEY + "reference_distance"]) == pytest.approx(1 + 0.5 * math.log(100))
    assert rows[501][KEY + "reference_distance"] == ""  # it had ended
    # 1 + 0.5·log u = 0.5 + 0.25·log t
    assert float(rows[1000][KEY + "reference_update"]) == pytest.approx(math.exp(0.5 * math.log(1000) - 1), rel=0.02)
    # The reference stood at 1 + 0.5·log 200 when it dropped its rate: t = exp((0.5 + 0.5·log 200) / 0.25)
    needed = math.exp((0.5 + 0.5 * math.log(200)) / 0.25)
    assert float(rows[1000][KEY + "remaining_updates"]) == pytest.approx(needed - 1000, rel=1e-3)
    assert rows[79][KEY + "remaining_updates"] == ""  # under two decades
    assert KEY + "remaining_updates" in run.progress_bar_metrics
    printed = " ".join(capsys.readouterr().out.split())
    assert diffusion.advice in printed
    assert f"keep this learning rate for {needed - 1000:.0f} more updates" in printed


def test_forecast_is_that_of_the_function_on_the_whole_trace(tmp_path, small_batch_run):
    class Noisy(Walk):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            with torch.no_grad():
                self.weight += 0.02 * math.sin(7 * self.global_step)

    diffusion = UltraSlowDiffusion(reference=str(small_batch_run / "diffusion.csv"))
    with pytest.warns(UserWarning, match="measured 33 in its reference"):
        run, _ = fit(tmp_path, diffusion, model=Noisy(), max_steps=1000, max_epochs=-1)
    trace = diffusion.trace
    forecast = forecast_updates(trace["updates"], trace["distance"], 1 + 0.5 * math.log(200), resamples=199)
    seen = [float(run.callback_metrics[KEY + f"remaining_updates{end}"]) for end in ("", "_low", "_high")]
    assert seen == pytest.approx([t - 1000 for t in forecast], rel=1e-5)
    assert seen[1] < seen[0] < seen[2]


def test_a_finished_run_is_a_reference(tmp_path):
    first = UltraSlowDiffusion()
    fit(tmp_path, first, logger=CSVLogger(tmp_path / "small"))
    assert list(read_reference(str(tmp_path / "small")).distances) == first.trace["distance"]
    second = UltraSlowDiffusion(reference=str(tmp_path / "small"))
    run, _ = fit(tmp_path, second)
    assert "is reached" in second.advice  # the same run again
    assert float(run.callback_metrics[KEY + "reference_distance"]) == pytest.approx(first.trace["distance"][-1])


def test_reference_that_is_not_there_is_refused_before_training(tmp_path):
    model = Net()
    with pytest.raises(MisconfigurationException, match="does not exist: name a diffusion"):
        fit(tmp_path, UltraSlowDiffusion(reference=str(tmp_path / "none")), model=model)
    assert model._trainer is None or model.trainer.global_step == 0


def test_tensorboard_gets_a_figure_and_a_table(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, UltraSlowDiffusion(), logger=logger)
    events = EventAccumulator(logger.log_dir).Reload()
    assert KEY + "figure" in events.Tags()["images"]
    assert KEY + "trace/text_summary" in events.Tags()["tensors"]


def test_wandb_gets_axes_a_figure_and_a_table(tmp_path):
    pytest.importorskip("matplotlib")
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(save_dir=tmp_path, mode="offline")
    try:
        defined = []
        define = logger.experiment.define_metric
        logger.experiment.define_metric = lambda name, **kwargs: (
            defined.append((name, kwargs)) or define(name, **kwargs)
        )
        fit(tmp_path, UltraSlowDiffusion(), logger=logger)
        summary = dict(logger.experiment.summary)
        assert (KEY + "distance", {"step_metric": KEY + "log_updates"}) in defined
        assert summary[KEY + "figure"]["_type"] == "images/separated"
        assert summary[KEY + "trace"]["ncols"] == 6
    finally:
        wandb.finish()


def test_plot_shows_laws_drops_and_reference(tmp_path, small_batch_run):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    diffusion = UltraSlowDiffusion(reference=str(small_batch_run))
    with pytest.warns(UserWarning, match="in its reference"):
        fit(tmp_path, diffusion, model=Net(milestones=[102]), max_epochs=20)
    figure, ax = diffusion.plot()
    assert ax.get_xscale() == "log"
    assert len(ax.lines) == 5  # reference, points, two laws, one drop
    assert [line.get_linestyle() for line in ax.lines].count(":") == 1
    matplotlib.pyplot.close(figure)
