"""The section of targets: the numbers of the files, and profiles that are shares."""

import re

import pytest

pytest.importorskip("matplotlib")

from logged_runs import run_to_target
from test_runs import _csv, _mlflow, _tensorboard, _wandb

from lightning_gap.cli import main
from lightning_gap.dashboards import render_html
from lightning_gap.dashboards.comparison import compare
from lightning_gap.dashboards.runs import read_runs
from lightning_gap.dashboards.targets import Target

LOSS = Target("val_loss", "<=", 0.3)


@pytest.fixture
def runs(tmp_path):
    for batch in (16, 64):
        run_to_target(tmp_path / f"b{batch}", batch)
    run_to_target(tmp_path / "short", 64, short=True)
    return read_runs([tmp_path])


def section(runs, **options):
    report = compare(runs, **options)
    return next(section for section in report.sections if section.title == "To the target"), render_html(report)


def test_updates_and_samples_of_each_run(runs):
    found, page = section(runs, targets=[LOSS])
    assert found.lead.startswith("2 of 3 trials")
    table = found.blocks[0]
    assert [row.label for row in table.rows] == ["b16", "b64", "short"]
    assert [[cell.text for cell in row] for row in table.cells()] == [
        ["16", "500", "8,000"],
        ["64", "200", "12,800"],
        ["64", "–", "–"],
    ]
    assert [row.detail for row in table.rows] == ["held", "held", "missed"]
    assert "To val_loss&lt;=0.3" in page


def test_profiles_are_shares_of_trials(runs):
    found, _ = section(runs, targets=[LOSS])
    updates, samples = found.blocks[-1].figures
    assert updates.alt.endswith("16 ends at 100%, 64 ends at 50%")
    assert samples.title == "Samples to the target"
    assert found.blocks[-2].entries == ["16", "64"]


def test_runs_are_grouped_by_a_hyper_parameter(runs):
    found, _ = section(runs, targets=[LOSS, Target("val_loss", "<=", 0.8)], by="lr")
    assert found.lead.startswith("5 of 6 trials")
    assert found.blocks[-2].entries == ["0.1"]
    assert section(runs, targets=[LOSS], by="weight")[0].blocks[-2].entries == ["weight not told"]


def test_without_a_target_there_is_no_section(runs):
    assert "To the target" not in [section.title for section in compare(runs).sections]
    with pytest.raises(ValueError, match="no run logged acc"):
        compare(runs, targets=[Target("acc", ">=", 1)])


@pytest.mark.parametrize("write", [_csv, _tensorboard, _wandb, _mlflow])
def test_any_logger(write, tmp_path):
    write(tmp_path / "run")
    found, _ = section(read_runs([tmp_path]), targets=[Target("train_loss", "<=", 1.5)], hold=1)
    assert found.lead.startswith("1 of 1 trial,")


def test_the_command(tmp_path, capsys):
    for batch in (16, 64):
        run_to_target(tmp_path / f"b{batch}", batch)
    page = tmp_path / "page.html"
    main(["report", str(tmp_path), "--output", str(page), "--target", "val_loss<=0.3", "--target", "val_loss<=0.5"])
    assert len(re.findall("<caption>To val_loss", page.read_text())) == 2
    for wrong in ("val_loss", "acc>=1"):
        with pytest.raises(SystemExit, match="2"):
            main(["report", str(tmp_path), "--output", str(page), "--target", wrong])
