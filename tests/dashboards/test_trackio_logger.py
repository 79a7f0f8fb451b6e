"""Runs logged to Trackio, where it is installed, and what is said where it is not."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_gap.dashboards.runs import read_runs
from lightning_gap.dashboards.trackio_logger import TrackioLogger

HERE = Path(__file__).parents[1]

RUN = """
import sys
from logged_runs import monge_run
from lightning.pytorch.loggers import CSVLogger
from lightning_gap.dashboards.logged_report import log_report
from lightning_gap.dashboards.trackio_logger import TrackioLogger
folder = sys.argv[1]
logger = TrackioLogger("maps", name="mine", auto_log_cpu=False)
csv = CSVLogger(f"{folder}/csv")
trainer = monge_run(folder, [csv, logger])
log_report([logger], [csv.log_dir])
logger.experiment.finish()
"""


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="needs Trackio")
def test_trackio_holds_what_csv_holds(tmp_path):

    paths = os.pathsep.join(map(str, (HERE, HERE.parent)))
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", RUN, str(tmp_path)], check=True, env=environment, stdout=subprocess.DEVNULL)
    (run,), (csv,) = read_runs([tmp_path / "trackio"]), read_runs([tmp_path / "csv"])
    assert run.name == "mine"
    own = {key for key in csv.metrics if key.startswith("lightning_gap/")}
    assert own == {key for key in run.metrics if key.startswith("lightning_gap/")}
    for key in own:
        assert run.metrics[key][:, 0].tolist() == csv.metrics[key][:, 0].tolist()
        assert run.metrics[key][:, 1] == pytest.approx(csv.metrics[key][:, 1], rel=1e-5)
    assert set(run.pictures) == set(csv.pictures) == {"lightning_gap/monge/map"}
    assert run.config["dim"] == 2
    assert list((tmp_path / "trackio" / "artifacts").rglob("*"))


def test_without_trackio_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"TrackioLogger needs trackio: pip install 'lightning_gap\[trackio\]'"
    ):
        TrackioLogger("maps")


class Run:
    """What stands in for a run of Trackio."""

    def __init__(self, name):
        self.name, self.config, self.rows = name, {}, []

    def log(self, values, step=None):
        self.rows.append((step, values))


@pytest.fixture
def begun(monkeypatch):
    options = []

    class Trackio:
        @staticmethod
        def init(**given):
            options.append(given)
            return Run(given["name"])

    monkeypatch.setitem(sys.modules, "trackio", Trackio)
    return options


def test_a_run_begins_when_it_is_needed_and_once(begun):
    logger = TrackioLogger("maps", "mine", group="g")
    assert (logger.name, logger.version, begun) == ("maps", "mine", [])
    logger.log_hyperparams({"a": {"b": 1, "c": print}, "d": None})
    logger.log_metrics({"loss": 1}, step=3)
    assert begun == [{"project": "maps", "name": "mine", "embed": False, "group": "g"}]
    assert logger.experiment.config == {"a/b": 1, "a/c": str(print), "d": None}
    assert logger.experiment.rows == [(3, {"loss": 1.0})]


def test_a_configuration_that_comes_late_is_warned_of(begun):
    logger = TrackioLogger("maps")
    logger.log_hyperparams({"a": 1})
    logger.log_metrics({"loss": 1})
    logger.log_hyperparams({"a": 1})
    with pytest.warns(UserWarning, match="as it was at the first metric"):
        logger.log_hyperparams({"a": 2})
