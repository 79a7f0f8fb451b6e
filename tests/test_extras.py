"""Without an optional library: its extra is named, and the rest goes on."""

import sys

import numpy as np
import pytest
import torch
from logged_runs import csv_run

from lightning_gap import UltraSlowDiffusion
from lightning_gap.cli import main
from lightning_gap.diffusion import UltraSlowDiffusionFit, WeightDistance, estimate_alpha
from lightning_gap.extras import library
from lightning_gap.monge import MapScores, MongeGap
from lightning_gap.monge.figure import MapFigure
from lightning_gap.monge.plot import plot_map
from lightning_gap.trainer.loggers import log_figure


@pytest.fixture
def without(monkeypatch):
    def leave_out(name):
        for module in [name, *(module for module in sys.modules if module.startswith(f"{name}."))]:
            monkeypatch.setitem(sys.modules, module, None)

    return leave_out


def fitted():
    metric = UltraSlowDiffusionFit()
    t = torch.logspace(0, 3, 20, dtype=torch.float64)
    metric.update(t, t.log())
    return metric


DRAWINGS = {
    "plot()": [
        lambda: UltraSlowDiffusion().plot(),
        lambda: estimate_alpha(torch.nn.Linear(9, 1), lambda m: m.weight.sum(), radius=1.0, samples=99).plot(),
        lambda: fitted().plot(),
    ],
    "WeightDistance.plot()": [lambda: WeightDistance(torch.nn.Linear(1, 1)).plot(torch.tensor(1.0))],
    "MongeGap.plot()": [lambda: MongeGap().plot(torch.tensor(1.0))],
    "MapScores.plot()": [lambda: MapScores().plot({"monge_gap": torch.tensor(1.0)})],
    "plot_map": [lambda: plot_map(*np.zeros((3, 4, 2)))],
    "MapFigure": [lambda: MapFigure().setup(None, None, "fit")],
}


@pytest.mark.parametrize("who", DRAWINGS)
def test_whatever_draws_names_the_extra(who, without):
    without("matplotlib")
    for draw in DRAWINGS[who]:
        with pytest.raises(ModuleNotFoundError) as raised:
            draw()
        assert str(raised.value) == f"{who} needs matplotlib: pip install 'lightning_gap[plots]'"


def test_loggers_do_without_figures(without, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    without("matplotlib")
    log_figure([CSVLogger(tmp_path)], "key", lambda: library("matplotlib.figure", "a figure", "plots"), 1)
    with pytest.raises(ModuleNotFoundError, match="numbers needs nosuchlibrary"):
        log_figure([CSVLogger(tmp_path)], "key", lambda: library("nosuchlibrary", "numbers", "all"), 1)


def test_the_dashboard_says_what_is_missing_before_it_asks(without, capsys):
    without("wandb_workspaces")
    for arguments in ((), ("--entity", "e", "--project", "p")):
        with pytest.raises(SystemExit) as ended:
            main(["dashboard", *arguments])
        assert ended.value.code == 2
        assert "pip install 'lightning_gap[wandb]'" in capsys.readouterr().err


def test_the_dashboard_asks_for_what_it_needs(capsys):
    pytest.importorskip("wandb_workspaces")
    with pytest.raises(SystemExit):
        main(["dashboard"])
    assert "--entity, --project" in capsys.readouterr().err


def test_a_report_leaves_out_what_it_cannot_read_and_says_so(without, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    without("tensorboard")
    csv_run(tmp_path / "runs" / "one")
    (tmp_path / "runs" / "two").mkdir()
    (tmp_path / "runs" / "two" / "events.out.tfevents.1.host").touch()
    (tmp_path / "runs" / "three").mkdir()
    (tmp_path / "runs" / "three" / "metrics.csv").write_text("loss\n1.0\n")
    page = tmp_path / "report.html"
    main(["report", str(tmp_path / "runs"), "--output", str(page)])
    said = capsys.readouterr()
    assert "1 run: open" in said.out
    for reason in ("needs tensorboard: pip install tensorboard", "no column 'step'"):
        assert reason in said.err
        assert reason.replace("'", "&#39;") in page.read_text(encoding="utf-8")
    with pytest.raises(SystemExit):  # nothing else is left
        main(["report", str(tmp_path / "runs" / "two"), "--output", str(page)])
    assert "pip install tensorboard" in capsys.readouterr().err
