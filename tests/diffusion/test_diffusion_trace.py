"""What a run has recorded: its file, points that are no numbers, and traces too short for a law."""

import csv
import math
import warnings

import matplotlib.figure
import pytest
from diffusion_runs import KEY, Net, fit, read_csv
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_gap.diffusion import ReferenceRun, UltraSlowDiffusion, read_reference
from lightning_gap.diffusion.distance import WeightDisplacement
from lightning_gap.diffusion.trace import LiveComparison, Trace, free_stem


def test_csv_is_beside_the_checkpoints(tmp_path):
    diffusion = UltraSlowDiffusion(groups={"head": r"^net\.4"})
    checkpoint = ModelCheckpoint(tmp_path / "run", save_last=True)
    fit(tmp_path, diffusion, checkpoint, max_epochs=2, enable_checkpointing=True)
    rows = read_csv(tmp_path / "run" / "diffusion.csv")
    for name, values in diffusion.trace.items():
        assert [float(row[name]) for row in rows] == values
    assert {row["parameters"] for row in rows} == {str(sum(p.numel() for p in Net().parameters()))}
    fit(tmp_path, UltraSlowDiffusion(), checkpoint, max_epochs=1, enable_checkpointing=True)
    assert len(read_csv(tmp_path / "run" / "diffusion-v1.csv")) == 10
    assert len(read_csv(tmp_path / "run" / "diffusion.csv")) == len(rows)


def test_csv_is_in_the_log_folder_or_nowhere(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(tmp_path, UltraSlowDiffusion(), logger=logger, max_epochs=1)
    assert len(read_csv(f"{logger.log_dir}/diffusion.csv")) == 10
    fit(tmp_path / "nothing", UltraSlowDiffusion(), max_epochs=1)
    assert not list((tmp_path / "nothing").rglob("*"))


def test_csv_outlives_a_crash(tmp_path):
    class Crash(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 7:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, UltraSlowDiffusion(), Crash(), logger=CSVLogger(tmp_path))
    assert len(read_csv(next(tmp_path.rglob("diffusion.csv")))) == 7


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("from_update", [1, 105])
def test_distances_that_are_not_finite_are_said_once_and_kept_out_of_all_else(tmp_path, value, from_update):
    class Astray(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step + 1 == from_update:
                pl_module.net[4].weight.data[0, 0] = value

    write = UltraSlowDiffusion()
    fit(tmp_path / "reference", write, logger=CSVLogger(tmp_path / "reference"))
    diffusion, logger = UltraSlowDiffusion(reference=str(tmp_path / "reference")), CSVLogger(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, diffusion, Astray(), logger=logger, max_epochs=14)
    said = [str(warning.message) for warning in caught if "NaN or infinite" in str(warning.message)]
    assert len(said) == 1
    assert ("at update 1:" if from_update == 1 else "at update 112, and was a number at update 100:") in said[0]
    assert f"({'net.0' if from_update > 1 else 'net.4'}.weight" in said[0]  # what is astray spreads to the others
    trace = diffusion.trace
    kept = [t for t, d in zip(trace["updates"], trace["distance"], strict=True) if math.isfinite(d)]
    assert kept == [t for t in trace["updates"] if t < from_update]
    assert trace["updates"][-1] > 100
    fitted = diffusion.diffusion_fit
    assert (fitted and fitted.last_update) == (None if from_update == 1 else 100)
    assert (diffusion.advice is None) == (from_update == 1)
    diffusion.plot(matplotlib.figure.Figure().add_subplot())
    with open(f"{logger.log_dir}/metrics.csv") as file:
        logged = [float(row[KEY + "distance"]) for row in csv.DictReader(file) if row.get(KEY + "distance")]
    assert len(logged) == len(kept)
    assert all(map(math.isfinite, logged))


def test_a_trace_too_short_says_what_its_owner_can_do(tmp_path, capsys):
    fit(tmp_path, UltraSlowDiffusion(), max_epochs=1)
    said = " ".join(capsys.readouterr().out.split())
    assert "train longer, or call fit_diffusion with lower minimum_decades" in said


def test_a_trace_needs_no_trainer(tmp_path):
    before = Trace(["head"])
    moved = [WeightDisplacement(1 + 0.5 * math.log(t), 1.0, 2.0, 0.5) for t in (1, 10)]
    for t, there in zip((1, 10), moved, strict=True):
        before.add(t, 0.1, there, {"head": there})
    trace = Trace(["head", "new"], before.columns)
    assert trace.columns["distance/head"] == trace.columns["distance"]
    assert all(math.isnan(x) for x in trace.columns["distance/new"])
    for t in (20, 50, 100, 200, 500, 1000):
        there = WeightDisplacement(1 + 0.5 * math.log(t), 1.0, 2.0, 0.5)
        trace.add(t, 0.1 if t < 1000 else 0.01, there, {"head": there, "new": there})
    law, varied = trace.fit()
    assert (law.last_update, varied) == (500, False)
    assert trace.forecast(1 + 0.5 * math.log(5000)).update == pytest.approx(5000)
    assert trace.forecast(2.0) is None  # it is there already
    trace.write(str(tmp_path / "deep" / "diffusion.csv"), 7)
    again = read_reference(str(tmp_path))
    assert (list(again.distances), again.parameters) == (trace.columns["distance"], 7)
    assert free_stem(str(tmp_path / "deep")) == "diffusion-v1"


def test_a_comparison_forecasts_on_the_grid():
    updates = range(1, 301)
    reference = ReferenceRun("", tuple(updates), tuple(1 + 0.5 * math.log(t) for t in updates), (0.1,) * 300, 0)
    trace, live = Trace(), LiveComparison(reference, points_per_decade=1)
    seen = {}
    for t in range(1, 1001):
        there = WeightDisplacement(0.25 * math.log(t), 1.0, 1.0, 1.0)
        trace.add(t, 0.1, there, {})
        if t in (50, 100, 900, 1000):
            seen[t] = live.numbers(trace, t, there.distance)
    assert math.isnan(seen[50]["remaining_updates"])  # under two decades
    assert seen[100]["reference_distance"] == pytest.approx(reference.distances[99])
    assert math.isnan(seen[900]["reference_distance"])  # it had ended
    needed = math.exp((1 + 0.5 * math.log(300)) / 0.25)
    for t in (100, 900, 1000):
        assert seen[t]["remaining_updates"] == pytest.approx(needed - t, rel=1e-6)
        assert seen[t]["remaining_updates_low"] <= seen[t]["remaining_updates"] <= seen[t]["remaining_updates_high"]
