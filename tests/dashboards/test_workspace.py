"""The W&B workspace: each of its panels finds its keys, over the right axis, in an offline run read back."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("wandb")
pytest.importorskip("wandb_workspaces")
pytest.importorskip("matplotlib")

from logged_runs import large_batch_run, monge_run

from lightning_gap.dashboards.runs import wandb_records
from lightning_gap.dashboards.workspace import build_workspace, panels, workspace_json

RUNS = {"large-batch": large_batch_run, "monge": monge_run}


def _finished(file):
    """The records, once W&B's process has written the last one."""
    for _ in range(600):
        records = list(wandb_records(file)) if file.stat().st_size > 7 else []
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.1)
    raise TimeoutError(f"{file} has no exit record")


class Offline:
    """What an offline run holds."""

    def __init__(self, folder):
        (file,) = Path(folder).glob("wandb/offline-run-*/run-*.wandb")
        self.file = file
        self.rows, self.config, self.axes = [], {}, {}
        for record in _finished(file):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                self.rows.append({item.key or item.nested_key[0] for item in record.history.item})
            elif kind == "config":
                self.config |= {item.key or item.nested_key[0]: item.value_json for item in record.config.update}
            elif kind == "metric" and record.metric.name:
                self.axes[record.metric.name] = record.metric.step_metric


@pytest.fixture(scope="module", params=list(RUNS))
def run(request, tmp_path_factory):
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    folder = tmp_path_factory.mktemp("wandb")
    try:
        RUNS[request.param](folder, WandbLogger(save_dir=folder, mode="offline"))
    finally:
        wandb.finish()
    return request.param, Offline(folder)


def test_every_panel_finds_its_keys_over_its_axis(run):
    kind, offline = run
    wanted = panels([kind])
    assert len(wanted) >= 5
    for panel in wanted:
        for key in panel.y:
            rows = [row for row in offline.rows if key in row]
            assert rows, f"{panel.title}: nothing logged {key}"
            if panel.kind == "scatter":
                assert panel.x in offline.config, f"{panel.title}: {panel.x} is not in the configuration"
            elif panel.kind == "lines":
                assert all(panel.x in row for row in rows), f"{panel.title}: {key} without {panel.x}"


def test_every_metric_of_the_package_has_its_axis(run):
    _, offline = run
    media = ("/plan", "/trace", "/figure", "/map")
    logged = {
        key for row in offline.rows for key in row if key.startswith("lightning_gap/") and not key.endswith(media)
    }
    assert len(logged) > 5
    for key in logged:
        room = key.split("/")[1]
        axis = f"lightning_gap/{room}/" + ("log_updates" if room == "diffusion" else "updates")
        assert key == axis or offline.axes[key] == axis
        assert all(axis in row for row in offline.rows if key in row)


def test_the_run_holds_what_makes_it_comparable(run):
    kind, offline = run
    if kind == "monge":
        assert {"cost", "gap_weight", "fitting_cost"} <= set(offline.config)
        return
    names = ("regime/reference_batch_size", "regime/batch_size", "regime/lr_factor", "ghost/ghost_batch_size",
             "diffusion/reference", "diffusion/parameters")  # fmt: skip
    assert {f"lightning_gap/{name}" for name in names} <= set(offline.config)
    assert any("lightning_gap/regime/plan" in row for row in offline.rows)


def test_the_json_holds_every_panel():
    workspace = build_workspace("team", "project", group_by="batch")
    sent = workspace_json(workspace)
    assert json.loads(sent)["entity"] == "team"
    for panel in panels():
        for key in (*panel.y, panel.x):
            assert key in sent
    drawn = [p for s in json.loads(sent)["spec"]["section"]["panelBankConfig"]["sections"] for p in s["panels"]]
    assert len(drawn) == len(panels())


def test_runs_are_grouped_as_asked():
    def grouping(group_by):
        return json.dumps(json.loads(workspace_json(build_workspace("e", "p", group_by=group_by)))["spec"]["section"]
                          ["runSets"][0]["grouping"])  # fmt: skip

    assert "batch_size" not in grouping("none")
    assert "reference_batch_size" in grouping("reference")
    assert grouping("batch").count("batch_size") == 2


def test_the_axis_of_distance_is_logarithmic():
    (path,) = [panel for panel in panels() if panel.y == ("lightning_gap/diffusion/distance",)]
    assert path.log_x
    assert path.x == "lightning_gap/diffusion/updates"


def test_own_metrics_are_drawn():
    keys = {key for panel in panels(["large-batch"], train_metric="a", val_metric="b") for key in panel.y}
    assert {"a", "b"} <= keys


def test_the_terminal_viewer_of_wandb_finds_axes_and_values(run):
    _, offline = run
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(offline.file)]
    records = [
        json.loads(line) for line in subprocess.run(command, check=True, capture_output=True).stdout.splitlines()
    ]
    axes = {
        record["metric"]["name"]: record["metric"].get("step_metric")
        for record in records
        if record["type"] == "metric" and "name" in record["metric"]
    }
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    seen = set()
    for key, axis in axes.items():
        room = key.rpartition("/")[0]
        if key.startswith("lightning_gap/") and axis is not None:
            assert axis.startswith(f"{room.partition('/distance')[0]}/")
            mine = [row for row in rows if key in row]
            # A chart has a point where the row has a number on either axis.
            assert all(isinstance(row[axis], int | float) for row in mine)
            at = [row[axis] for row in mine if isinstance(row[key], int | float)]
            assert at == sorted(at)
            seen |= {key} if at else set()
    assert len(seen) > 5
