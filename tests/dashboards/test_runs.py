"""Runs read back: the same numbers from any logger's files, and one clear line for each file that is none."""

import importlib.util
import json
import shutil
import sqlite3
import struct
import zlib
from contextlib import closing
from pathlib import Path

import pytest
from logged_runs import csv_run

from lightning_gap.dashboards.runs import RunError, find_runs, read_runs

METRICS = [  # step, what was logged in one call
    (0, {"train_loss": 2.0, "lightning_gap/monge/train_loss": 2.0, "lightning_gap/monge/updates": 0.0}),
    (1, {"train_loss": 1.0, "lightning_gap/monge/train_loss": 1.0, "lightning_gap/monge/updates": 1.0}),
    (1, {"val_loss": 1.5, "lightning_gap/monge/val_loss": 1.5, "lightning_gap/monge/updates": 2.0}),
]
SERIES = {
    "train_loss": [[0, 2], [1, 1]],
    "val_loss": [[1, 1.5]],
    "lightning_gap/monge/train_loss": [[0, 2], [1, 1]],
    "lightning_gap/monge/val_loss": [[2, 1.5]],  # after two updates, though logged at step 1
    "lightning_gap/monge/updates": [[0, 0], [1, 1], [2, 2]],
}


def _record(kind, item, values):
    from wandb.proto import wandb_internal_pb2

    record = wandb_internal_pb2.Record()
    part = record.history if kind == "history" else record.config
    for key, value in values.items():
        entry = (part.item if kind == "history" else part.update).add()
        entry.nested_key.append(key)
        entry.value_json = json.dumps(value)
    return record.SerializeToString()


def _wandb_file(path, records):
    """Write the log as W&B does: in blocks of 32 KiB, records cut where a block ends."""
    raw = bytearray(struct.pack("<4sHB", b":W&B", 0xBEE1, 0))
    for record in records:
        first = True
        while True:
            left = 32768 - len(raw) % 32768
            if left < 7:
                raw += bytes(left)
                left = 32768
            part, record = record[: left - 7], record[left - 7 :]
            kind = (1 if first else 4) if not record else (2 if first else 3)
            raw += struct.pack("<IHB", zlib.crc32(part, zlib.crc32(bytes([kind]))), len(part), kind) + part
            first = False
            if not record:
                break
    path.write_bytes(raw)


def _csv(folder):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(folder, name="", version="")
    logger.log_hyperparams({"lr": 0.5})
    for step, values in METRICS:
        logger.log_metrics(values, step)
    logger.save()


def _tensorboard(folder):
    pytest.importorskip("tensorboard")
    import time

    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
    logger.log_hyperparams({"lr": 0.5})
    for step, values in METRICS:
        logger.log_metrics(values, step)
        time.sleep(0.01)
    logger.save()
    logger.finalize("success")


def _wandb(folder):
    pytest.importorskip("wandb")
    folder.mkdir()
    rows = [{"trainer/global_step": step, **values} for step, values in METRICS]
    records = [_record("config", None, {"lr": 0.5, "padding": "x" * 70_000})]
    _wandb_file(folder / "run-abc.wandb", records + [_record("history", None, row) for row in rows])


def _mlflow(folder):
    for name in ("metrics", "params", "tags"):
        (folder / name).mkdir(parents=True)
    (folder / "meta.yaml").write_text("run_id: abc\nartifact_uri: file:///nowhere\n")
    (folder / "params" / "lr").write_text("0.5")
    for call, (step, values) in enumerate(METRICS):
        for key, value in values.items():
            path = folder / "metrics" / key
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(f"{1000 + call} {value} {step}\n")


def _trackio(folder, name="first", file="maps.db"):
    """Write what Trackio leaves of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(folder / file)) as database, database:
        for table, columns in {
            "metrics": "id INTEGER PRIMARY KEY, timestamp, run_name, step, metrics",
            "configs": "run_name, config", "project_metadata": "key, value",
        }.items():  # fmt: skip
            database.execute(f"CREATE TABLE IF NOT EXISTS {table} ({columns})")
        config = {"lr": 0.5, "_Created": "2026-01-01"}
        database.execute("INSERT INTO configs VALUES (?, ?)", (name, json.dumps(config).encode()))
        for call, (step, values) in enumerate(METRICS):
            row = (f"2026-01-01T00:00:0{call}+00:00", name, step, json.dumps(values).encode())
            database.execute("INSERT INTO metrics (timestamp, run_name, step, metrics) VALUES (?, ?, ?, ?)", row)


def test_all_runs_of_trackio_are_read(tmp_path):
    for name, file in (("first", "a.db"), ("second", "a.db"), ("third", "b.db")):
        _trackio(tmp_path, name, file)
    picture = tmp_path / "media" / "a" / "first" / "1" / "x.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"png")
    figure = {"lightning_gap/monge/map": {"_type": "trackio.image", "file_path": "a/first/1/x.png"}}
    with closing(sqlite3.connect(tmp_path / "a.db")) as database, database:
        row = ("2026-01-01T00:00:09+00:00", "first", 1, json.dumps(figure).encode())
        database.execute("INSERT INTO metrics (timestamp, run_name, step, metrics) VALUES (?, ?, ?, ?)", row)
    with closing(sqlite3.connect(tmp_path / "other.db")) as database, database:  # another program's
        database.execute("CREATE TABLE metrics (x)")
    runs = read_runs([tmp_path])
    assert [run.name for run in runs] == ["first", "second", "third"]
    assert runs[0].pictures == {"lightning_gap/monge/map": b"png"}
    assert runs[0].seconds.tolist() == [[0, 0], [1, 1], [1, 2], [1, 9]]


def test_a_broken_row_of_trackio_is_said(tmp_path):
    _trackio(tmp_path)
    with closing(sqlite3.connect(tmp_path / "maps.db")) as database, database:
        database.execute("UPDATE metrics SET metrics = '{' WHERE id = 1")
    with pytest.raises(RunError, match="cannot be read as a project of Trackio"):
        read_runs([tmp_path])


@pytest.mark.parametrize("write", [_csv, _tensorboard, _wandb, _mlflow, _trackio])
def test_the_same_numbers_from_any_files(write, tmp_path):
    write(tmp_path / "run")
    (run,) = read_runs([tmp_path])
    assert {key: series.tolist() for key, series in run.metrics.items() if key != "epoch"} == SERIES
    assert run.config["lr"] == 0.5
    assert run.last("val_loss") == 1.5
    assert run.last("nothing") is None
    assert run.updates == 2


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="needs MLflow")
def test_what_mlflow_itself_writes(tmp_path, monkeypatch):
    from lightning.pytorch.loggers import MLFlowLogger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path / 'mlruns'}", run_name="mine")
    for step, values in METRICS:
        logger.log_metrics(values, step)
    (run,) = read_runs([tmp_path / "mlruns"])
    assert run.name == "mine"
    assert run.metrics["val_loss"].tolist() == [[1, 1.5]]


def test_a_run_cut_off_is_read_as_far_as_it_goes(tmp_path):
    _wandb(tmp_path / "run")
    file = tmp_path / "run" / "run-abc.wandb"
    file.write_bytes(file.read_bytes()[:-5])
    (run,) = read_runs([tmp_path])
    assert run.metrics["train_loss"].tolist() == [[0, 2], [1, 1]]
    assert "val_loss" not in run.metrics


def test_a_damaged_run_is_refused(tmp_path):
    _wandb(tmp_path / "run")
    file = tmp_path / "run" / "run-abc.wandb"
    raw = bytearray(file.read_bytes())
    raw[100] ^= 1
    file.write_bytes(raw)
    with pytest.raises(RunError, match="is damaged at byte 7"):
        read_runs([tmp_path])


def test_every_run_is_found_once(tmp_path):
    for name in ("a", "b/lightning_logs/version_0", "b/lightning_logs/version_1"):
        csv_run(tmp_path / name)
    runs = read_runs([tmp_path, tmp_path / "a", tmp_path / "b" / "lightning_logs"])
    assert [run.name for run in runs] == ["a", "b", "b/version_1"]
    assert {run.kind for run in runs} == {"CSV"}


def test_runs_are_found_whatever_their_folders_are_called(tmp_path):
    for name in ("a", "files/b", "logs/c", "artifacts/d", "checkpoints/e"):
        csv_run(tmp_path / name)
    assert len(find_runs(tmp_path)) == 5


def test_what_a_run_of_wandb_logged_beside_lightning_is_read(tmp_path):
    pytest.importorskip("wandb")
    rows = [_record("history", None, {"_step": 3, "own": 1.5}), _record("history", None, {"stray": 2.5})]
    _wandb_file(tmp_path / "run-x.wandb", rows)
    (run,) = read_runs([tmp_path])
    assert run.metrics["own"].tolist() == [[3, 1.5]]
    assert run.last("stray") == 2.5
    assert run.updates == 3


def test_names_differ(tmp_path):
    csv_run(tmp_path / "x" / "lightning_logs" / "version_0")
    csv_run(tmp_path / "x" / "csv_logs" / "version_0")
    assert [run.name for run in read_runs([tmp_path])] == ["x (CSV)", "x (CSV) 2"]


def test_a_run_by_one_of_its_files(tmp_path):
    run = csv_run(tmp_path / "mine")
    assert find_runs(run / "metrics.csv") == [("CSV", run)]


def test_a_trace_alone_is_a_run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "diffusion.csv").write_text("updates,distance,parameters\n1,0.5,9\n10,1.5,9\n")
    (run,) = read_runs([tmp_path])
    assert run.metrics["lightning_gap/diffusion/distance"].tolist() == [[1, 0.5], [10, 1.5]]


def test_a_trace_beside_metrics_is_no_second_run(tmp_path):
    run = csv_run(tmp_path / "run")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "diffusion.csv").write_text("updates,distance\n1,0.5\n")
    assert len(read_runs([tmp_path])) == 1


def test_objects_in_the_hyperparameters_are_left_out(tmp_path):
    (run,) = read_runs([csv_run(tmp_path / "run")])
    assert run.config["lr"] == 0.1
    assert run.config["act"] is None


def test_the_latest_picture_is_kept(tmp_path):
    run = csv_run(tmp_path / "run")
    for step in (3, 12):
        path = run / "figures" / "lightning_gap" / "monge" / "map" / f"{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\x89PNG%d" % step)
    (read,) = read_runs([run])
    assert read.pictures == {"lightning_gap/monge/map": b"\x89PNG12"}


def test_nan_is_left_out(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss\n0,nan\n1,2.0\n2,inf\n3,\n")
    (run,) = read_runs([tmp_path])
    assert run.metrics["loss"].tolist() == [[1, 2]]


def _nothing(folder):
    folder.mkdir()


def _not_lightnings(folder):
    folder.mkdir()
    (folder / "metrics.csv").write_text("a,b\n1,2\n")


def _not_wandbs(folder):
    folder.mkdir()
    (folder / "run-abc.wandb").write_bytes(b"hello, this is no run")


def _not_mlflows(folder):
    _mlflow(folder)
    (folder / "metrics" / "loss").write_text("1000 many 3\n")


def _not_text(folder):
    folder.mkdir()
    (folder / "metrics.csv").write_bytes(b"step,loss\n0,\xff\xfe\n")


def _not_a_trace(folder):
    folder.mkdir()
    (folder / "diffusion.csv").write_text("x,y\n1,2\n")


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda folder: None, "does not exist: give the folder of a run"),
        (_nothing, "holds no run: expected a metrics.csv"),
        (_not_lightnings, "has no column 'step'"),
        (_not_wandbs, "is not an offline run of W&B"),
        (_not_mlflows, "is not a metric of MLflow"),
        (_not_text, "cannot be read as a run of CSV"),
        (_not_a_trace, "is not a trace of UltraSlowDiffusion"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(write, said, tmp_path):
    if write is _not_wandbs:
        pytest.importorskip("wandb")
    write(tmp_path / "run")
    with pytest.raises(RunError, match=said) as refused:
        read_runs([tmp_path / "run"])
    assert "\n" not in str(refused.value)
    assert str(tmp_path) in str(refused.value)


def test_reading_changes_nothing(tmp_path):
    run = csv_run(tmp_path / "run")
    before = {path: path.read_bytes() for path in Path(run).rglob("*")}
    read_runs([run])
    assert {path: path.read_bytes() for path in Path(run).rglob("*")} == before
    shutil.rmtree(run)
