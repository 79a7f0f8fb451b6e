"""The check of the rule that chooses, on digits: what is run, and what its log holds."""

import math

import pytest

from benchmarks.logs import read

pytest.importorskip("sklearn")
from benchmarks.science.large_batch.auto_rule import LOG, cells, table, trained


def test_a_run_is_as_long_as_planned_and_says_what_was_chosen():
    found = trained("SGD", "auto", 32, 1, 0.0, 0)
    assert found["updates"] == math.ceil(1400 / 256)
    assert found["why"] == "sqrt, with a warm-up over 10 % of the updates"
    assert 5 < found["accuracy"] <= 100
    assert trained("AdamW", "auto", 32, 1, 1.0, 0)["why"].startswith("as it is")


def test_the_log_has_every_cell_once_and_the_table_every_row():
    rows = read(LOG)
    for cell in cells([0, 1, 2]):
        assert sum(cell.items() <= row.items() for row in rows) == 1, cell
    assert len(table(rows).splitlines()) == 1 + 2 * 2 * (1 + 2 * 3)
