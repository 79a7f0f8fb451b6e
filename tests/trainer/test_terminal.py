"""What callbacks say: once, and readable wherever it goes."""

import io

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table

from lightning_gap.trainer.terminal import say


def _table():
    table = Table("what", "how much", title="Facts")
    table.add_row("‖w_t − w_0‖", "[1, 2]")
    return table


def test_a_log_file_has_no_colours_and_at_most_120_columns(capsys):
    say(_table(), "x" * 300)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[1, 2]" in out
    *table, line = out.splitlines()
    assert max(map(len, table)) <= 120
    assert line == "x" * 300


def test_brackets_are_not_markup(capsys):
    say("values [bold]1[/bold] and [2]")
    assert capsys.readouterr().out == "values [bold]1[/bold] and [2]\n"


def test_an_output_of_few_signs_ends_no_run(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    say(_table(), "‖w‖ = 1")
    said = written.getvalue().decode("ascii")
    assert "?w? = 1" in said
    assert "?w_t ? w_0?" in said


def test_a_notebook_shows_html(monkeypatch, capsys):
    shown = []
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda segments, text: shown.append(text))
    say(_table())
    assert "how much" in shown[0]
    assert capsys.readouterr().out == ""


def test_a_window_has_its_own_width(monkeypatch):
    window = Console(file=io.StringIO(), force_terminal=True, width=40)
    monkeypatch.setattr("lightning_gap.trainer.terminal.Console", lambda **options: window)
    say(_table())
    assert max(len(line) for line in window.file.getvalue().splitlines()) <= 80  # colours count


def test_two_ranks_say_it_once(monkeypatch, capsys):
    for rank in (0, 1):
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        say("said")
    assert capsys.readouterr().out == "said\n"
