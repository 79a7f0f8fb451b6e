"""The examples' and pages' commands run as they are written, but for a few updates only."""

import io
import re
import runpy
import shlex
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from lightning_gap.cli import main

ROOT = Path(__file__).parents[1]
SHORT = ["--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
TRAINER = ("fit", "validate", "test", "predict")
# What a newcomer meets in a run of two updates, and can do nothing about.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*val_check_interval.*"),
    pytest.mark.filterwarnings("ignore:.*tight_layout.*"),
]


def _head(name):
    """Return the commands in the comment at the head of a configuration."""
    lines = (ROOT / "examples" / name).read_text(encoding="utf-8").splitlines()
    return [found[1] for line in lines if (found := re.match(r"#   (\S.*)", line))]


def _blocks(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def _is_of_maps(line):
    words = line.split()
    return (
        words[:2] == ["python", "examples/make_data.py"]
        or words[:1] == ["mkdir"]
        or (words[:1] == ["lightning-gap"] and words[1] in (*TRAINER, "transport") and "--devices" not in words)
    )


def _run(line, monkeypatch):
    program, *words = shlex.split(line, comments=True)
    if program == "lightning-gap":
        fast = SHORT if words[0] == "fit" else SHORT[1:] if words[0] in TRAINER else []
        fast = [] if "--help" in words or any(word.startswith("--print_config") for word in words) else fast
        words, _, output = " ".join(words).partition(" > ")
        code: object = None
        with redirect_stdout(io.StringIO()) as said:
            try:
                main([*words.split(), *fast])
            except SystemExit as ended:
                code = ended.code
        assert not code, line
        if output:
            Path(output).write_text(said.getvalue(), encoding="utf-8")
    elif program == "mkdir":  # and cp; by Python, as the tests' PATH has neither
        folder, copied = line.removeprefix("mkdir -p ").split(" && cp ")
        Path(folder).mkdir(parents=True)
        *files, to = copied.split()
        for file in files:
            shutil.copy(file, to)
    else:
        assert program == "python"
        script, *arguments = words
        if arguments[:1] == ["fit"]:
            arguments += [*SHORT[1:], "--trainer.max_epochs=2", "--model.milestones=[1]"]
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(script, run_name="__main__")


@pytest.fixture
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")


@pytest.mark.usefixtures("_folder", "brief_starts")
@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("monge_map.yaml", "data/mapped.npy"),
        ("conditional.yaml", "data/on_drugs.csv"),
        ("sphere.yaml", "data/north_mapped.npy"),
        ("colour_transfer.yaml", "china_recoloured.png"),
        ("large_batch.yaml", "report.html"),
    ],
)
def test_an_example_runs_as_its_head_says(name, left, monkeypatch):
    for module in ("pandas", "matplotlib", *(("sklearn", "PIL") if left.endswith(("png", "html")) else ())):
        pytest.importorskip(module)
    pytest.importorskip("jsonargparse")
    if left.endswith("png"):
        datasets = pytest.importorskip("sklearn.datasets")
        monkeypatch.setattr(
            datasets, "load_sample_image", lambda name, load=datasets.load_sample_image: load(name)[::4, ::4]
        )
    commands = _head(name)
    assert len(commands) >= 2
    for line in commands:
        _run(line, monkeypatch)
    assert Path(left).stat().st_size > 0


def test_every_configuration_is_in_the_table():
    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "examples").iterdir():
        assert f"({path.name})" in text or path.name in ("README.md", "__pycache__")


@pytest.mark.usefixtures("_folder", "brief_starts")
def test_the_readme_of_the_examples_runs_as_written(monkeypatch):
    pytest.importorskip("pandas")
    pytest.importorskip("jsonargparse")
    for line in _blocks("examples/README.md"):
        _run(line, monkeypatch)
    assert np.load("data/mapped.npy").shape == (2000, 10)


@pytest.mark.usefixtures("_folder", "brief_starts")
def test_the_page_s_commands_of_maps_run_in_turn(monkeypatch):
    pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    pytest.importorskip("jsonargparse")
    lines = [line for line in _blocks("docs/command_line.md") if _is_of_maps(line)]
    assert {line.split()[1] for line in lines} >= {*TRAINER, "transport"}  # processes have tests of their own
    for line in lines:
        _run(line, monkeypatch)
