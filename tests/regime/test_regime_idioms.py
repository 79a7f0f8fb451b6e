"""Lengths from wherever scripts take them, under LargeBatchRegime: equal to the reference run's rates, or refused."""

from importlib.util import find_spec

import pytest
from idiom_schedules import schedulers
from regime_idioms import BATCHES, IDIOMS, SHARES, balanced_cells, outcome

CELLS = balanced_cells()


@pytest.mark.parametrize("idiom", IDIOMS)
def test_a_schedule_is_the_reference_runs_or_refused(idiom):
    wrong = {cell: found for cell in CELLS if cell.idiom == idiom and (found := outcome(*cell)).word == "WRONG"}
    assert not wrong


def test_every_idiom_and_every_scheduler_meets_every_share_and_batch():
    for part in ("name", "idiom"):
        met = {}
        for cell in CELLS:
            shares, batches = met.setdefault(getattr(cell, part), (set(), set()))
            shares.add(cell.share)
            batches.add(cell.batches)
        for of, (shares, batches) in met.items():
            if part == "name" or len([cell for cell in CELLS if cell.idiom == of]) > 10:
                assert (shares, batches) == (set(SHARES), set(BATCHES)), of


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_the_schedules_of_a_library_are_among_them(library):
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    assert any(build.__module__ == "idiom_schedules" for build in schedulers().values())


@pytest.mark.parametrize("name", ["SequentialLR"])
def test_a_run_resumes_from_any_update(name, tmp_path):
    pass
