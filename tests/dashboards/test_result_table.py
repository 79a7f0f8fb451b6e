"""Tables: means, deviations, marks."""

import io
from statistics import stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lightning_gap.dashboards import Column, ResultTable, Row

numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=4)


def _table(rows, best="max", digits=2):
    return ResultTable("t", "run", [Column("value", digits, best)], [Row(f"r{i}", [v]) for i, v in enumerate(rows)])


def test_seeds_become_mean_and_sample_deviation():
    cell = _table([[1.0, 2.0, 4.0]]).cells()[0][0]
    assert cell.text == "2.33"
    assert cell.deviation == f"{stdev([1.0, 2.0, 4.0]):.2f}"


def test_one_seed_has_no_deviation():
    assert _table([[1.0]]).cells()[0][0].deviation == ""


@settings(deadline=None, max_examples=50)
@given(st.lists(numbers, min_size=1, max_size=5), st.sampled_from(["max", "min"]))
def test_the_mark_is_on_the_best_mean(rows, best):
    cells = [row[0] for row in _table(rows, best).cells()]
    means = [sum(row) / len(row) for row in rows]
    winner = means.index(max(means) if best == "max" else min(means))
    assert cells[winner].best
    assert all(cell.text == cells[winner].text for cell in cells if cell.best)


def test_equal_readings_share_the_mark():
    assert [row[0].best for row in _table([1.001, 1.004, 0.5]).cells()] == [True, True, False]


def test_texts_are_neither_numbers_nor_marked():
    cells = _table(["–", 1.0]).cells()
    assert (cells[0][0].text, cells[0][0].best, cells[1][0].best) == ("–", False, True)


def test_no_mark_unless_asked():
    assert not any(row[0].best for row in _table([1.0, 2.0], best=None).cells())


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="'a' has 2 values for 1 columns"):
        ResultTable("t", "run", [Column("v")], [Row("a", [1.0, 2.0])])


def test_no_numbers_are_refused():
    with pytest.raises(ValueError, match="without numbers"):
        _table([[]])


def test_the_terminal_shows_the_same_words():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(_table([[1.0, 2.0], [0.25, 0.5]]).to_rich())
    text = console.export_text()
    assert "1.50 ± 0.71" in text
    assert "r1" in text
