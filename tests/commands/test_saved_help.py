"""Help that is kept: as it would be made, until something that it was made from changes."""

import gc
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from lightning_gap.cli import main
from lightning_gap.commands import TRAINER_COMMANDS, saved_help
from lightning_gap.commands.saved_help import print_help


@pytest.fixture(autouse=True)
def _kept_here(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Help of a file, which counts how often it is made."""
    source = tmp_path / "source.py"
    source.write_text("1")
    monkeypatch.setitem(sys.modules, "source", type(sys)("source"))
    sys.modules["source"].__file__ = str(source)
    monkeypatch.setattr(saved_help, "_loaded", lambda: [each for each in REAL() if each[0] == str(source)])
    count = []

    def make():
        count.append(1)
        print(f"{source.read_text()} at {os.environ['COLUMNS']}")
        raise SystemExit(0)

    return source, make, count


REAL = saved_help._loaded


def shown(make, capsys):
    with suppress(SystemExit):
        print_help("fit", make)
    return capsys.readouterr().out


def test_help_is_made_once(made, capsys):
    _, make, count = made
    assert [shown(make, capsys) for _ in range(3)] == ["1 at 100\n"] * 3
    assert len(count) == 1


def test_a_changed_source_is_read_again(made, capsys):
    source, make, count = made
    shown(make, capsys)
    source.write_text("2")
    os.utime(source, ns=(5, 5))
    assert shown(make, capsys) == shown(make, capsys) == "2 at 100\n"
    source.write_text("22")  # within the same tick
    os.utime(source, ns=(5, 5))
    assert shown(make, capsys) == "22 at 100\n"
    assert len(count) == 3


def test_another_width_or_terminal_is_another_help(made, capsys, monkeypatch):
    _, make, count = made
    shown(make, capsys)
    monkeypatch.setenv("COLUMNS", "60")
    assert shown(make, capsys) == "1 at 60\n"
    monkeypatch.setenv("NO_COLOR", "1")
    shown(make, capsys)
    assert len(count) == 3


def test_what_is_installed_counts(made, capsys, monkeypatch):
    _, make, count = made
    shown(make, capsys)
    monkeypatch.setattr(saved_help, "_installed", lambda: [["torch-9.dist-info", 1]])
    shown(make, capsys)
    shown(make, capsys)
    assert len(count) == 2


def test_what_is_installed_anywhere_on_the_path_counts(made, capsys, monkeypatch, tmp_path):
    _, make, count = made
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    shown(make, capsys)
    (tmp_path / "ruyaml-1.dist-info").mkdir()
    shown(make, capsys)
    shown(make, capsys)
    assert len(count) == 2


def test_another_path_or_flag_of_the_interpreter_is_another_help(made, capsys, monkeypatch, tmp_path):
    _, make, count = made
    shown(make, capsys)
    with monkeypatch.context() as other:
        other.setattr(sys, "path", [*sys.path, str(tmp_path)])
        shown(make, capsys)
    assert len(count) == 2
    with monkeypatch.context() as other:
        other.setattr(sys, "flags", SimpleNamespace(optimize=2, verbose=0))
        shown(make, capsys)
    assert len(count) == 3
    (tmp_path / "ruyaml").mkdir()
    (tmp_path / "ruyaml" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path[1:]])  # as by python -m in that folder
    shown(make, capsys)
    assert len(count) == 4


def test_the_last_few_texts_are_kept(made, capsys, monkeypatch):
    _, make, _ = made
    folder = Path(os.environ["XDG_CACHE_HOME"], "lightning_gap")
    folder.mkdir(parents=True)
    (folder / "help-test-0.json").touch()  # of another command
    for width in range(60, 80):
        monkeypatch.setenv("COLUMNS", str(width))
        shown(make, capsys)
    assert len(list(folder.glob("help-fit-*"))) == 6
    assert (folder / "help-test-0.json").exists()


def test_what_cannot_be_written_leaves_nothing(made, capsys, monkeypatch):
    _, make, _ = made

    def fail(*_):
        raise OSError("no space is left")

    monkeypatch.setattr(os, "replace", fail)
    assert shown(make, capsys) == "1 at 100\n"
    assert not list(Path(os.environ["XDG_CACHE_HOME"], "lightning_gap").iterdir())


def test_without_a_home_help_is_made(made, capsys, monkeypatch):
    _, make, count = made

    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", fail)
    assert shown(make, capsys) == shown(make, capsys) == "1 at 100\n"
    assert len(count) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b'{"help": 1}',
        b'{"installed": 0, "files": 0, "help": ""}',
        b'{"installed": INSTALLED, "files": [], "help": 1}',
        b"[" * 100_000,
        b'{"installed": INSTALLED, "files": [], "help": "\\ud800"}',
    ],
    ids=range(8),
)
def test_a_damaged_file_is_made_anew(made, capsys, content):
    _, make, count = made
    shown(make, capsys)
    (path,) = Path(os.environ["XDG_CACHE_HOME"], "lightning_gap").iterdir()
    path.write_bytes(content.replace(b"INSTALLED", json.dumps(saved_help._installed()).encode()))
    assert shown(make, capsys) == shown(make, capsys) == "1 at 100\n"
    assert len(count) == 2


def test_where_nothing_can_be_kept_it_is_made(made, capsys, monkeypatch, tmp_path):
    _, make, count = made
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert shown(make, capsys) == shown(make, capsys) == "1 at 100\n"
    assert len(count) == 2


def test_what_fails_is_not_kept(capsys):
    def fail():
        print("half")
        raise SystemExit(2)

    with pytest.raises(SystemExit):
        print_help("fit", fail)
    assert not Path(os.environ["XDG_CACHE_HOME"]).exists()


def test_the_second_help_is_the_first_and_imports_nothing_heavy(capsys):
    pytest.importorskip("jsonargparse")
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    first = capsys.readouterr().out
    assert "--data.source" in first
    assert "--model.gap_weight" in first
    code = (
        "import sys\nfrom lightning_gap.cli import main\nmain(['fit', '--help'])\n"
        "print([m for m in ('torch', 'lightning', 'numpy', 'jsonargparse') if m in sys.modules])\n"
    )
    same = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[1:])}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=same).stdout
    assert out == f"{first}[]\n"


@pytest.mark.parametrize("command", list(TRAINER_COMMANDS))
def test_one_command_s_parser_is_as_among_all(command, capsys):
    pytest.importorskip("jsonargparse")
    from lightning_gap.commands.map_cli import run_trainer, trainer_parsers

    # Help lists the subclasses of an optimizer that there are, those of other tests too until they are collected.
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(SystemExit):
            run_trainer([command, "--help"])
        alone = capsys.readouterr().out
        every = trainer_parsers()
    finally:
        gc.enable()
    assert list(every) == list(TRAINER_COMMANDS)
    # The usage of a parser that is on its own names no command before it.
    assert every[command].format_help().partition("options:")[2] == alone.partition("options:")[2]
