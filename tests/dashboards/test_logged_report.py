"""The page of a report as an artifact of a run, under every logger."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import CSVLogger
from logged_runs import csv_run

pytest.importorskip("matplotlib")

from lightning_gap.dashboards.logged_report import log_report


class Experiment:
    def __init__(self):
        self.logged = []

    def log_artifact(self, *what, **options):
        paths = [Path(each) for each in what if str(each).endswith(".html")]
        self.logged.append((what, options, [path.read_text() for path in paths]))


def logger_of(kind):
    return type(kind, (), {"experiment": Experiment(), "run_id": "abc"})()


def test_csv_has_it_in_its_folder(tmp_path):
    csv_run(tmp_path / "run")
    logger = CSVLogger(tmp_path / "logs")
    log_report([logger], [tmp_path / "run"], name="comparison")
    page = Path(logger.log_dir, "pages", "comparison.html").read_text()
    assert page.startswith("<!doctype html>") or "<html" in page
    assert "run" in page


def test_mlflow_and_trackio_have_an_artifact(tmp_path):
    csv_run(tmp_path / "run")
    mlflow, trackio = logger_of("MLFlowLogger"), logger_of("TrackioLogger")
    log_report([mlflow, trackio], [tmp_path / "run"])
    ((what, _, (page,)),) = mlflow.experiment.logged
    assert (what[0], what[2]) == ("abc", "pages")
    ((_, options, (again,)),) = trackio.experiment.logged
    assert options == {"name": "report", "type": "report"}
    assert "<html" in page
    assert again == page


def test_wandb_has_an_artifact(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    csv_run(tmp_path / "run")
    logger, added = logger_of("WandbLogger"), []
    fake = SimpleNamespace(add_file=lambda path: added.append(Path(path).name))
    monkeypatch.setattr(wandb, "Artifact", lambda name, type: added.append((name, type)) or fake)
    log_report([logger], [tmp_path / "run"])
    assert added == [("report", "report"), "report.html"]
    assert logger.experiment.logged[0][0] == (fake,)


def test_another_logger_is_told(tmp_path):
    csv_run(tmp_path / "run")
    with pytest.warns(UserWarning, match="Other takes no files: report.html is not logged to it"):
        log_report([logger_of("Other")], [tmp_path / "run"])
