"""The same keys, tables and figures under every logger, and none under none."""

import csv
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from logged_runs import large_batch_run, monge_run

from lightning_gap.dashboards.runs import read_runs
from lightning_gap.trainer import loggers

FIGURES = {"large-batch": {"lightning_gap/diffusion/figure"}, "monge": {"lightning_gap/monge/map"}}


def _loggers(folder, monkeypatch):
    found = [CSVLogger(folder / "csv")]
    if importlib.util.find_spec("tensorboard"):
        found.append(TensorBoardLogger(folder / "tensorboard"))
    if importlib.util.find_spec("mlflow"):
        from lightning.pytorch.loggers import MLFlowLogger

        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        found.append(MLFlowLogger(tracking_uri=f"file:{folder / 'mlflow'}"))
    return found


@pytest.mark.parametrize("kind", ["large-batch", "monge"])
def test_all_loggers_hold_the_same(kind, tmp_path, monkeypatch):
    used = _loggers(tmp_path, monkeypatch)
    {"large-batch": large_batch_run, "monge": monge_run}[kind](tmp_path, used)
    runs = [run for logger in ("csv", "tensorboard", "mlflow") if (tmp_path / logger).exists()
            for run in read_runs([tmp_path / logger])]  # fmt: skip
    assert len(runs) == len(used)
    first = runs[0]
    own = {key for key in first.metrics if key.startswith("lightning_gap/")}
    assert len(own) > 5
    for run in runs:
        assert set(run.pictures) == FIGURES[kind]
        assert {key for key in run.metrics if key.startswith("lightning_gap/")} == own
        for key in own:
            # Twice the same at one step may be once: of MLflow, what is of one step and millisecond is one row.
            (steps, values), (steps_of_first, values_of_first) = (
                np.unique(one.metrics[key].astype("f4"), axis=0).T for one in (run, first)
            )
            assert steps.tolist() == steps_of_first.tolist(), (run.kind, key)
            assert values == pytest.approx(values_of_first, rel=1e-5)
        if kind == "large-batch":
            assert int(run.config["lightning_gap/regime/reference_batch_size"]) == 4
    if kind == "monge":
        assert first.metrics["lightning_gap/monge/train_loss"][:, 0].tolist() == list(range(9))
        assert first.metrics["lightning_gap/monge/val_loss"][:, 0].tolist() == [3, 6, 9]


def test_tables_are_files_under_csv(tmp_path):
    logger = CSVLogger(tmp_path)
    large_batch_run(tmp_path, logger)
    with Path(logger.log_dir, "tables/lightning_gap/regime/plan.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["", "reference", "now"]
    assert ["batch (samples per update)", "4", "16"] in rows


@pytest.mark.parametrize("run", [large_batch_run, monge_run])
def test_none_at_all(run, tmp_path):
    fit = run(tmp_path, False, enable_checkpointing=False)
    assert any(key.startswith("lightning_gap/") for key in fit.callback_metrics)
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("run", [large_batch_run, monge_run])
def test_a_fast_development_run_writes_nothing(run, tmp_path):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(tmp_path, CSVLogger(tmp_path), fast_dev_run=True)
    assert not list(tmp_path.rglob("*"))


def test_figures_are_left_out_without_matplotlib(tmp_path):
    def draw():
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib.figure")

    loggers.log_figure([CSVLogger(tmp_path)], "lightning_gap/x/y", draw, 0)
    assert not list(tmp_path.rglob("*.png"))


def test_another_missing_module_is_not_hidden(tmp_path):
    def draw():
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    with pytest.raises(ModuleNotFoundError, match="scipy"):
        loggers.log_figure([CSVLogger(tmp_path)], "lightning_gap/x/y", draw, 0)


def test_nothing_is_drawn_for_nobody():
    loggers.log_figure([], "lightning_gap/x/y", lambda: pytest.fail("drawn"), 0)


def test_the_figure_of_a_logger_derived_from_lightnings(tmp_path):
    class Mine(CSVLogger):
        pass

    from matplotlib.figure import Figure

    logger = Mine(tmp_path)
    loggers.log_figure([logger], "lightning_gap/x/y", Figure, 7)
    assert Path(logger.log_dir, "figures/lightning_gap/x/y/00000007.png").read_bytes().startswith(b"\x89PNG")


def test_mlflow_does_not_end_a_run_that_goes_on_with_another_plan():
    class MLFlowLogger:  # what MLflow does, without it
        run_id = "1"

        def __init__(self):
            self.params = {}
            self.experiment = self

        def get_run(self, run_id):
            return SimpleNamespace(data=SimpleNamespace(params=self.params))

        def log_hyperparams(self, params):
            for key, value in params.items():
                if self.params.setdefault(key, str(value)) != str(value):
                    raise RuntimeError("Changing param values is not allowed")

    logger = MLFlowLogger()
    loggers.log_facts([logger], "a/", {"epochs": 1, "rule": "sqrt"})
    with pytest.warns(UserWarning, match="another a/epochs. Log to a new run"):
        loggers.log_facts([logger], "a/", {"epochs": 16, "rule": "sqrt", "clip": 5.0})
    assert logger.params == {"a/epochs": "1", "a/rule": "sqrt", "a/clip": "5.0"}


def test_tables_and_figures_follow_csv_to_a_remote_folder(tmp_path, monkeypatch):
    import fsspec
    from matplotlib.figure import Figure

    monkeypatch.chdir(tmp_path)
    logger = CSVLogger("memory://runs")
    loggers.log_table([logger], "a/b", ["x"], [[1]])
    loggers.log_figure([logger], "a/c", Figure, 7)
    found = fsspec.filesystem("memory").find("/runs")
    assert [name.partition("version_0/")[2] for name in found] == ["figures/a/c/00000007.png", "tables/a/b.csv"]
    assert not list(tmp_path.rglob("*"))
