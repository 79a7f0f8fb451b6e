"""What runs took to a target, read from the files of any logger."""

import numpy as np
import pytest
from test_runs import _csv, _mlflow, _tensorboard, _wandb

from lightning_gap.dashboards.runs import Run, read_runs
from lightning_gap.dashboards.targets import Target
from lightning_gap.dashboards.to_target import batch_of, learning_rate_of, setting_of, to_its_end, to_target

REGIME = "lightning_gap/regime/"


def run(metrics=None, seconds=(), **config):
    series = {key: np.array(points, dtype=float) for key, points in (metrics or {}).items()}
    return Run("a", "CSV", None, config, series, {}, np.array(seconds, dtype=float).reshape(-1, 2))


@pytest.mark.parametrize("write", [_csv, _tensorboard, _wandb, _mlflow])
def test_the_same_from_any_files(write, tmp_path):
    write(tmp_path / "run")
    (logged,) = read_runs([tmp_path])
    found = to_target(logged, Target("train_loss", "<=", 1.5), hold=1, batch=8)
    # 2.0 after one update, 1.0 after two
    assert (found.updates, found.samples, found.outcome) == (1.5, 12.0, "held")
    assert to_target(logged, Target("val_loss", "<=", 1.0)).outcome == "missed"
    assert to_target(logged, Target("val_loss", "<=", 1.5)).outcome == "touched"
    assert to_target(logged, Target("val_acc", ">=", 1.0)).outcome == "not logged"
    assert to_its_end(logged, batch=8).updates == 2


@pytest.mark.parametrize("write", [_tensorboard, _mlflow])
def test_time_is_read_where_it_is_logged(write, tmp_path):
    write(tmp_path / "run")
    (logged,) = read_runs([tmp_path])
    assert logged.seconds[0].tolist() == [0, 0]
    assert 0 < logged.seconds[-1, 1] < 10
    assert (np.diff(logged.seconds[:, 1]) >= 0).all()


def test_csv_has_no_time(tmp_path):
    _csv(tmp_path / "run")
    (logged,) = read_runs([tmp_path])
    assert len(logged.seconds) == 0
    assert to_target(logged, Target("train_loss", "<=", 1.5), hold=1).seconds is None


def test_time_at_the_pace_of_the_run():
    logged = run({"loss": [[i, 10 - i] for i in range(10)]}, [[i, 2.0 * i] for i in range(10)])
    assert to_target(logged, Target("loss", "<=", 5), hold=1).seconds == pytest.approx(12)  # six updates of two seconds


def test_samples_as_they_were_logged_win():
    samples = {f"{REGIME}samples_seen": [[10, 100], [20, 300]]}  # the batch has grown
    logged = run({"loss": [[i, 20 - i] for i in range(20)], **samples}, batch_size=7)
    assert to_target(logged, Target("loss", "<=", 6), hold=1).updates == 15
    assert to_target(logged, Target("loss", "<=", 6), hold=1).samples == pytest.approx(200)
    assert to_target(logged, Target("loss", "<=", 16), hold=1).samples == pytest.approx(50)


@pytest.mark.parametrize(
    ("logged", "batch"),
    [
        (run(**{f"{REGIME}batch_size": 64, "batch_size": 8}), 64),
        (run({f"{REGIME}samples_seen": [[5, 160]], f"{REGIME}updates": [[5, 5]]}, batch_size=8), 32),
        (run({f"{REGIME}critical_batch_size": [[5, 40]], f"{REGIME}batch_over_critical": [[5, 0.4]]}), 16),
        (run(batch_size=8), 8),
        (run({f"{REGIME}batch_size": [[1, 16], [9, 16]]}, batch_size=8), 16),
        (run({f"{REGIME}batch_size": [[1, 16], [9, 32]]}, batch_size=8), None),  # a schedule of batches
        (run(**{"data/batch_size": 8}), 8),
        (run(**{"data/batch_size": 8, "val/batch_size": 16}), None),
        (run(batch_size="many"), None),
        (run(), None),
    ],
)
def test_the_batch_is_what_the_run_says_of_its_updates(logged, batch):
    assert batch_of(logged) == batch


def test_the_rate_is_the_highest_that_was_logged():
    monitor = {"lr-SGD": [[0, 0.01], [5, 0.1], [9, 0.05]]}
    assert learning_rate_of(run(monitor, lr=0.3)) == 0.1
    assert learning_rate_of(run(monitor | {f"{REGIME}learning_rate": [[1, 0.4]]})) == 0.4
    assert learning_rate_of(run(lr=0.3)) == 0.3
    assert learning_rate_of(run()) is None
    assert setting_of(run(**{"optimizer/init_args/weight_decay": 0.1}), "weight_decay") == 0.1
