"""The pages' commands and code run as they are written."""

import re
import shlex
from pathlib import Path

import pytest
from logged_runs import csv_run

from lightning_gap.cli import main

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
COMMANDS = [
    pytest.param(line, id=f"{name}: {line[:60]}")
    for name, text in PAGES.items()
    for block in re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if line.startswith("lightning-gap ") and not line.startswith("lightning-gap demo")  # minutes; it has its own tests
]


def _blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def _folder(tmp_path, monkeypatch):
    """A folder with the runs that the pages speak of; nothing is sent."""
    for name in ("small", "large"):
        csv_run(tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_folder")
@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_runs_as_written(line, monkeypatch, capsys):
    words = shlex.split(line, comments=True)[1:]
    if words[0] == "report":
        pytest.importorskip("matplotlib")
    if words[0] == "completion":
        pytest.importorskip("shtab")
    if words[0] == "dashboard":
        ws = pytest.importorskip("wandb_workspaces.workspaces")
        monkeypatch.setattr(ws.Workspace, "save", lambda self: None)
        monkeypatch.setattr(ws.Workspace, "url", "https://wandb.ai/my-team/my-project")
    main(words)
    out, err = capsys.readouterr()
    assert out
    assert err == ""


def test_every_command_has_a_line():
    assert {line.values[0].split()[1] for line in COMMANDS} >= {"plan", "report", "dashboard", "completion"}


def test_the_plan_in_the_page_is_the_plan(capsys):
    (command, *_), (shown,) = _blocks("command_line.md", "bash"), _blocks("command_line.md", "text")
    main(shlex.split(command)[1:])
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == shown.splitlines()


@pytest.mark.usefixtures("_folder")
def test_the_dashboard_page_s_code_runs(tmp_path):
    wandb = pytest.importorskip("wandb")
    pytest.importorskip("matplotlib")
    (block,) = _blocks("dashboards.md", "python")
    block = block.replace(
        "Trainer(max_epochs=2,", 'Trainer(max_epochs=2, accelerator="cpu", enable_progress_bar=False,'
    )
    try:
        exec(block, {})
    finally:
        wandb.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/lightning_gap/monge/map_*.png"))


@pytest.mark.parametrize("page", PAGES)
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", PAGES[page]):
        assert (DOCS / target).exists(), target
