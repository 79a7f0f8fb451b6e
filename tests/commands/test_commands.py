"""The commands do what they say: plan, report, dashboard, completion."""

import json
import shutil
import subprocess

import pytest
import torch
from lightning.pytorch import Callback
from logged_runs import Net, csv_run, trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_gap import LargeBatchRegime
from lightning_gap.cli import main


def _said(capsys, *words):
    main(words)
    return capsys.readouterr().out


def _rows(table):
    """Return the cells of a printed table by its first column, lines joined that were broken."""
    rows, last = {}, None
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if len(cells) == 3:
            if not cells[0] and last is not None:
                last[:] = [" ".join(filter(None, pair)) for pair in zip(last, cells[1:], strict=True)]
            else:
                last = rows.setdefault(cells[0], cells[1:])
    return rows


class Rates(Callback):
    def __init__(self):
        self.rates = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


class Stepped(Net):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])]


def test_the_plan_is_what_training_does(capsys, tmp_path):
    regime, rates = LargeBatchRegime(4), Rates()
    fit = trainer(tmp_path, False, max_epochs=6, callbacks=[regime, rates], enable_checkpointing=False)
    data = TensorDataset(torch.randn(50, 4), torch.randn(50, 1))
    fit.fit(Stepped(), DataLoader(data, 16), DataLoader(data, 16))
    capsys.readouterr()
    out = _said(
        capsys, "plan", "--batch-size", "16", "--reference-batch-size", "4", "--samples", "50", "--epochs", "6",
        "--lr", "0.02", "--milestones", "2,4",
    )  # fmt: skip
    rows = _rows(out)
    assert rows["updates"] == [str(regime.plan.reference_updates), str(fit.global_step)]
    assert rows["epochs"][1] == str(regime.plan.epochs)
    assert float(rows["learning rate, group 0 (sqrt, x2)"][1]) == pytest.approx(rates.rates[0])
    falls = [update for update in range(1, len(rates.rates)) if rates.rates[update] != rates.rates[update - 1]]
    assert len(falls) == 2
    assert f"update {falls[0]}: 0.004" in out
    assert f"update {falls[1]}: 0.0004" in out


def test_a_plan_without_samples_has_no_epochs(capsys):
    rows = _rows(_said(capsys, "plan", "--batch-size", "8", "--reference-batch-size", "2", "--updates", "1_000"))
    assert rows["updates"] == ["1000", "1000"]
    assert "epochs" not in rows


def test_a_plan_of_the_same_epochs(capsys):
    out = _said(
        capsys, "plan", "--batch-size", "16", "--reference-batch-size", "4", "--samples", "50", "--epochs", "6",
        "--train-longer", "0",
    )  # fmt: skip
    assert _rows(out)["updates"] == [str(6 * 13), str(6 * 4)]


def test_a_plan_alone_asks_for_more(capsys):
    assert "Give --samples" in _said(capsys, "plan", "--batch-size", "16", "--reference-batch-size", "4")


def test_a_plan_in_a_log_file_has_no_colours_and_fits(capsys):
    out = _said(
        capsys, "plan", "--batch-size", "4096", "--reference-batch-size", "256", "--samples", "1281167",
        "--epochs", "90", "--lr", "0.1", "--milestones", "30,60,80",
    )  # fmt: skip
    assert "\x1b" not in out
    assert max(map(len, out.splitlines()[:-1])) <= 120


def test_the_report_is_written_and_summed_up(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("small", "large"):
        csv_run(tmp_path / "runs" / name)
    out = _said(capsys, "report", str(tmp_path / "runs"), "--output", str(tmp_path / "a" / "b.html"), "--title", "Two")
    page = (tmp_path / "a" / "b.html").read_text(encoding="utf-8")
    assert "<h1>Two</h1>" in page
    assert "small" in out
    assert "val_accuracy" in out
    assert "b.html" in out


def test_the_report_opens_in_the_browser_if_asked(capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    run = csv_run(tmp_path / "run")
    main(["report", str(run), "--output", str(tmp_path / "r.html")])
    main(["report", str(run), "--output", str(tmp_path / "r.html"), "--open"])
    assert opened == [(tmp_path / "r.html").as_uri()]


def test_the_dashboard_is_written_and_nothing_sent(capsys, tmp_path, monkeypatch):
    pytest.importorskip("wandb_workspaces")
    import wandb_workspaces.workspaces as ws

    monkeypatch.setattr(ws.Workspace, "save", lambda self: pytest.fail("sent"))
    file = tmp_path / "w.json"
    said = _said(capsys, "dashboard", "--entity", "e", "--project", "p", "--part", "monge", "--offline", str(file))
    assert "nothing was sent" in said
    text = file.read_text(encoding="utf-8")
    assert json.loads(text)["project"] == "p"
    assert "monge/map" in text
    assert "diffusion" not in text


def test_the_dashboard_is_sent(capsys, monkeypatch):
    pytest.importorskip("wandb_workspaces")
    import wandb_workspaces.workspaces as ws

    sent = []
    monkeypatch.setattr(ws.Workspace, "save", lambda self: sent.append(self))
    monkeypatch.setattr(ws.Workspace, "url", "https://wandb.ai/e/p?nw=1")
    assert "https://wandb.ai/e/p" in _said(capsys, "dashboard", "--entity", "e", "--project", "p", "--name", "mine")
    assert sent[0].name == "mine"


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh", "fish"])
def test_completion_knows_all_commands_and_options(capsys, shell):
    shtab = pytest.importorskip("shtab")
    if shell not in shtab.SUPPORTED_SHELLS:
        pytest.skip(f"shtab knows no {shell}")
    script = _said(capsys, "completion", shell)
    for word in ("demo", "plan", "report", "dashboard", "reference-batch-size", "offline"):
        assert word in script
    pytest.importorskip("jsonargparse")
    for word in (
        "fit",
        "predict",
        "transport",
        "trainer.max_steps",
        "model.gap_weight",
        "data.val_fraction",
        "columns",
    ):
        assert word in script


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes(capsys, tmp_path):
    pytest.importorskip("shtab")
    (tmp_path / "script").write_text(_said(capsys, "completion", "bash"))
    for command, start, word in (("plan", "--ref", "--reference-batch-size"), ("fit", "--model.gap_w", "gap_weight")):
        code = (
            "source ./script\n"
            f"COMP_WORDS=(lightning-gap {command} {start}) COMP_CWORD=2\n"
            f"$(complete -p lightning-gap | sed 's/.*-F \\([^ ]*\\).*/\\1/') lightning-gap {start} {command}\n"
            'echo "${COMPREPLY[@]}"\n'
        )
        done = subprocess.run([shutil.which("bash"), "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert word in done.stdout, done.stderr


def test_paths_are_completed_by_files(capsys):
    shtab = pytest.importorskip("shtab")
    script = _said(capsys, "completion", "bash")
    assert script.count(shtab.FILE["bash"]) >= 4  # of runs, --output, --offline, and of the demo's --output
