"""The pages' commands and code run as they are written."""

import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import docs_names
import pytest
from lightning.pytorch import Trainer, seed_everything
from logged_runs import csv_run

from lightning_gap import monge
from lightning_gap.cli import main

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
COMMANDS = [
    pytest.param(line, id=f"{name}: {line[:60]}")
    for name, text in PAGES.items()
    for block in re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    # The demo takes minutes, and has its own tests; commands of maps need each other: test_examples.py; and plans of a
    # configuration an example: test_plan_command.py.
    if re.match(r"lightning-gap (?!demo|fit|validate|test|predict|transport|plan --config)", line)
]


def _blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def _folder(tmp_path, monkeypatch):
    """A folder with the runs that the pages speak of; nothing is sent."""
    for name, batch in (("small", 64), ("large", 1024)):
        csv_run(tmp_path / "runs" / name, batch=batch)
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


@pytest.mark.parametrize("page", ["command_line.md", "howto_gpus.md"])
def test_the_plan_in_the_page_is_the_plan(page, capsys):
    (shown,) = (block for block in _blocks(page, "text") if block.startswith("Large-batch regime"))
    command = next(block for block in _blocks(page, "bash") if block.startswith("lightning-gap plan"))
    main(shlex.split(command.splitlines()[0])[1:])
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == shown.splitlines()


# Pages that have a test of their own.
ELSEWHERE = {"real_cells.md"}
# Pages whose code takes longer than some ten seconds on one core.
SLOW = {"howto_diffusion.md"}
# What a block needs beyond the tests' own packages.
EXTRAS = {
    "import anndata": "anndata",
    "import scanpy": "scanpy",
    "sklearn": "sklearn",
    "torch.onnx": "onnxscript",
    "Wandb": "wandb",
}


class OnACPU(Trainer):
    """The pages' Trainer, on one CPU and without progress bars, whatever it is told."""

    def __init__(self, **options):
        here = {"accelerator": "cpu", "devices": 1, "strategy": "auto"}
        super().__init__(**{**options, **here, "enable_progress_bar": False, "enable_model_summary": False})


@pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*", "ignore:.*running sanity check.*")
@pytest.mark.usefixtures("_folder", "brief_starts")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else [])
        for page in PAGES
        if _blocks(page, "python") and page not in ELSEWHERE
    ],
)
def test_a_page_s_code_runs_as_written(page, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.Trainer", OnACPU)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    seed_everything(0, verbose=False)
    name = page.removesuffix(".md")
    names = {"__name__": "page", **getattr(docs_names, name, lambda folder: {})(tmp_path)}
    missing = set()
    try:
        # One page is one program: later blocks use what earlier ones made.
        for number, block in enumerate(_blocks(page, "python"), start=1):
            needed = [package for word, package in EXTRAS.items() if word in block and not find_spec(package)]
            if needed:
                missing.update(needed)
                continue
            exec(compile(block, f"{page}, block {number}", "exec"), names)
    finally:
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish()
        if "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].close("all")
    if page == "dashboards.md" and not missing:
        assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/lightning_gap/monge/map_*.png"))
    if missing:
        pytest.skip(f"needs {', '.join(sorted(missing))}; the other blocks ran")


@pytest.mark.parametrize("page", PAGES)
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", PAGES[page]):
        assert (DOCS / target).exists(), target


def test_every_public_name_has_an_entry_in_the_api():
    shown = {
        line[4:]
        for page in DOCS.glob("api/*.md")
        for line in page.read_text("utf-8").splitlines()
        if line[:4] == "::: "
    }
    # These pages show whole packages.
    assert {f"lightning_gap.{name}" for name in ("regime", "ghost", "diffusion", "monge.costs", "dashboards")} <= shown
    names = {f"lightning_gap.monge.{name}" for name in monge.__all__ if name != "costs"}
    assert names <= shown, names - shown
