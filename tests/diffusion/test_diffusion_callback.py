"""The callback in a run: what it records, logs and says, and that it disturbs nothing."""

import csv
import math

import pytest
import torch
from diffusion_runs import KEY, Net, Reference, fit, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn

from lightning_gap.diffusion import (
    UltraSlowDiffusion,
    fit_diffusion,
)


def test_distances_are_those_of_the_slow_twin_on_the_log_grid(tmp_path):
    diffusion, reference = UltraSlowDiffusion(points_per_decade=5), Reference()
    fit(tmp_path, diffusion, reference)
    trace = diffusion.trace
    assert trace["updates"] == [1, 2, 3, 4, 6, 10, 16, 25, 40, 63, 100]
    assert trace["distance"] == pytest.approx([reference.distances[t] for t in trace["updates"]], rel=1e-6)
    assert trace["learning_rate"] == [0.05] * 11
    assert {len(values) for values in trace.values()} == {11}
    start = reference.start.norm().item()
    assert trace["relative_distance"] == pytest.approx([d / start for d in trace["distance"]], rel=1e-6)


def test_every_n_updates(tmp_path):
    diffusion = UltraSlowDiffusion(every_n_updates=25)
    fit(tmp_path, diffusion)
    assert diffusion.trace["updates"] == [25, 50, 75, 100]


def test_accumulation_counts_updates_not_batches(tmp_path):
    diffusion, reference = UltraSlowDiffusion(points_per_decade=3), Reference()
    fit(tmp_path, diffusion, reference, accumulate_grad_batches=4, max_epochs=4)
    trace = diffusion.trace
    assert trace["updates"] == [1, 2, 5, 10]  # 10 batches an epoch make 3 updates
    assert trace["distance"] == pytest.approx([reference.distances[t] for t in trace["updates"]], rel=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_run_is_bit_equal_with_and_without(tmp_path, precision):
    results = []
    for callbacks in ([], [UltraSlowDiffusion()]):
        run, model = fit(tmp_path, *callbacks, precision=precision, validate=True, max_epochs=3)
        metrics = {k: v for k, v in run.callback_metrics.items() if not k.startswith(KEY)}
        results.append((model.state_dict(), run.optimizers[0].state_dict(), metrics, torch.get_rng_state()))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_latest_point_is_in_callback_metrics(tmp_path):
    diffusion = UltraSlowDiffusion()
    run, _ = fit(tmp_path, diffusion)
    assert float(run.callback_metrics[KEY + "distance"]) == pytest.approx(diffusion.trace["distance"][-1])
    assert float(run.callback_metrics[KEY + "updates"]) == diffusion.trace["updates"][-1]


def test_every_point_reaches_the_loggers_at_the_step_of_self_log(tmp_path):
    diffusion = UltraSlowDiffusion(points_per_decade=5)
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    fit(tmp_path, diffusion, logger=logger, log_every_n_steps=50)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    points = [row for row in rows if row[KEY + "distance"]]
    assert [float(row[KEY + "updates"]) for row in points] == diffusion.trace["updates"]
    assert [float(row[KEY + "distance"]) for row in points] == pytest.approx(diffusion.trace["distance"])
    assert [float(row[KEY + "log_updates"]) for row in points] == pytest.approx(
        [math.log(t) for t in diffusion.trace["updates"]]
    )
    assert [int(row["step"]) + 1 for row in points] == diffusion.trace["updates"]
    assert [int(row["step"]) for row in rows] == sorted(int(row["step"]) for row in rows)
    final = [row for row in rows if row[KEY + "log_slope"]]
    assert len(final) == 1
    assert float(final[0][KEY + "log_slope"]) == pytest.approx(diffusion.diffusion_fit.log_slope)
    assert float(final[0][KEY + "log_r2"]) == pytest.approx(diffusion.diffusion_fit.log_r2)


def test_summary_says_both_laws(tmp_path, capsys):
    diffusion = UltraSlowDiffusion()
    fit(tmp_path, diffusion)
    printed, law = capsys.readouterr().out, diffusion.diffusion_fit
    assert f"{law.log_slope:.4g}·log t" in printed
    assert f"{law.power_r2:.4f}" in printed
    assert f"preferred: {'ultra-slow' if law.preferred == 'log' else 'power'}" in printed
    assert law == fit_diffusion(diffusion.trace["updates"], diffusion.trace["distance"])


def test_short_run_says_so_and_does_not_crash(tmp_path, capsys):
    diffusion = UltraSlowDiffusion()
    fit(tmp_path, diffusion, max_epochs=1)
    assert diffusion.diffusion_fit is None
    assert "no law fitted" in capsys.readouterr().out


def test_fit_takes_the_constant_stretch_of_the_learning_rate(tmp_path, capsys):
    diffusion = UltraSlowDiffusion()
    fit(tmp_path, diffusion, model=Net(milestones=[102]), max_epochs=20)
    trace = diffusion.trace
    high = [i for i, rate in enumerate(trace["learning_rate"]) if rate == 0.05]
    assert trace["updates"][high[-1]] == 100
    assert trace["learning_rate"][-1] == pytest.approx(0.005)
    expected = fit_diffusion([trace["updates"][i] for i in high], [trace["distance"][i] for i in high])
    assert diffusion.diffusion_fit == expected
    assert "constant learning rate" in " ".join(capsys.readouterr().out.split())


def test_learning_rate_is_that_of_the_update_itself(tmp_path):
    diffusion = UltraSlowDiffusion(every_n_updates=1)
    fit(tmp_path, diffusion, model=Net(milestones=[3]), max_epochs=1)
    assert diffusion.trace["learning_rate"][:5] == pytest.approx([0.05, 0.05, 0.05, 0.005, 0.005])


def test_whole_trace_is_fitted_and_said_where_the_rate_always_varies(tmp_path, capsys):
    diffusion = UltraSlowDiffusion()
    fit(tmp_path, diffusion, model=Net(milestones=[20, 40, 60]))
    assert diffusion.diffusion_fit.points == len(diffusion.trace["updates"])
    assert "the learning rate varied" in " ".join(capsys.readouterr().out.split())


def test_averaged_weights_in_validation_do_not_disturb(tmp_path):
    plain, averaged = UltraSlowDiffusion(), UltraSlowDiffusion()
    fit(tmp_path, plain, validate=True, max_epochs=4)
    fit(tmp_path, EMAWeightAveraging(decay=0.5), averaged, validate=True, max_epochs=4)
    assert averaged.trace == plain.trace


def test_two_optimizers_count_optimizer_steps(tmp_path):
    class Two(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            x, y = batch
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(nn.functional.mse_loss(self.net(x), y))
                optimizer.step()

        def configure_optimizers(self):
            return torch.optim.SGD(self.net[0].parameters(), 0.03), torch.optim.SGD(self.net[4].parameters(), 0.01)

    diffusion, reference = UltraSlowDiffusion(points_per_decade=5), Reference()
    fit(tmp_path, diffusion, reference, model=Two(), max_epochs=1)
    trace = diffusion.trace
    assert trace["updates"] == [2, 4, 6, 10, 16]
    assert trace["distance"] == pytest.approx([reference.distances[t] for t in trace["updates"]], rel=1e-6)
    assert trace["learning_rate"] == [0.03] * 5


def test_learning_rate_finder_leaves_the_anchor_to_the_run(tmp_path):
    diffusion, reference = UltraSlowDiffusion(points_per_decade=5), Reference()
    finder = LearningRateFinder(num_training_steps=20, update_attr=False)
    fit(tmp_path, finder, diffusion, reference, max_epochs=2, enable_checkpointing=True)
    trace = diffusion.trace
    assert trace["updates"] == [1, 2, 3, 4, 6, 10, 16]
    assert trace["distance"] == pytest.approx([reference.distances[t] for t in trace["updates"]], rel=1e-6)


def test_fast_dev_run(tmp_path):
    diffusion = UltraSlowDiffusion()
    fit(tmp_path, diffusion, fast_dev_run=True, logger=None)
    assert diffusion.trace["updates"] == [1]


def test_unknown_strategies_are_refused(tmp_path, monkeypatch):
    diffusion = UltraSlowDiffusion()
    run = trainer(tmp_path, [diffusion])
    monkeypatch.setattr(Trainer, "strategy", FSDPStrategy())
    with pytest.raises(MisconfigurationException, match="under strategy=FSDPStrategy"):
        diffusion.setup(run, Net(), "fit")


@pytest.mark.parametrize("name", ["points_per_decade", "every_n_updates"])
@pytest.mark.parametrize("value", [0, -3, 2.5, True, "5"])
def test_arguments_must_be_positive_integers(name, value):
    wrong = "at least 1" if type(value) is int else "an int"
    with pytest.raises((TypeError, ValueError), match=f"{name} must be {wrong}, got {value!r}"):
        UltraSlowDiffusion(**{name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exclude": "("}, "exclude='\\(' is not a regular expression"),
        ({"groups": {"a": 3}}, r"groups\['a'\] must be a regular expression or a function"),
        ({"anchor_dtype": "float8"}, "anchor_dtype must be 'float16', 'bfloat16' or None, got 'float8'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        UltraSlowDiffusion(**arguments)


def test_compiled_model(tmp_path):
    class Silent(Net):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return nn.functional.mse_loss(self.net(x), y)

    diffusion, reference = UltraSlowDiffusion(points_per_decade=5), Reference()
    fit(tmp_path, diffusion, reference, model=torch.compile(Silent(), backend="eager"), max_epochs=2)
    trace = diffusion.trace
    assert trace["distance"] == pytest.approx([reference.distances[t] for t in trace["updates"]], rel=1e-6)
