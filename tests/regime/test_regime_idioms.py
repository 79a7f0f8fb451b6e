"""Lengths from wherever scripts take them, under LargeBatchRegime: the reference run's rates, or refused."""

import pytest
from idiom_page import PAGE, family, read
from idiom_resumes import cells_to_resume, different_resumes
from idiom_scripts import outcome, start
from regime_idioms import IDIOMS, REAL, SHARES, SMALL, balanced_cells

ASKING = [idiom for idiom, its in IDIOMS.items() if its.asks]
# Of those that ask, one of each kind.
AT_REAL_SIZES = (
    "the epochs, a constant",
    "the updates, a constant",
    "epochs= and steps_per_epoch=, constants",
    "trainer.max_epochs",
    "estimated_stepping_batches",
    "max_epochs * len(loader held by the module)",
    "max_epochs * num_training_batches",
)
TOLD = [idiom for idiom, its in IDIOMS.items() if not its.asks]
SAID = read(PAGE.read_text(encoding="utf-8"))


# A third of the schedulers for each idiom, others for the next one; all of them take minutes.
@pytest.mark.parametrize(
    ("idiom", "every"),
    [*((idiom, 3) for idiom in ASKING), *(pytest.param(i, 1, marks=pytest.mark.slow) for i in ASKING)],
)
def test_a_length_that_is_asked_for_is_the_reference_runs(idiom, every):
    cells = [cell for cell in balanced_cells(SMALL) if cell.idiom == idiom]
    cells = cells[ASKING.index(idiom) % min(every, len(cells)) :: every]
    different = {cell: found for cell in cells if (found := outcome(*cell)).word != "equal"}
    assert cells
    assert not different


@pytest.mark.parametrize("idiom", AT_REAL_SIZES)
def test_at_real_sizes_a_length_that_is_asked_for_is_not_refused(idiom):
    cells = [cell for cell in balanced_cells(REAL) if cell.idiom == idiom]
    different = {cell: found for cell in cells if (found := start(*cell)).word != "equal"}
    assert cells
    assert not different


@pytest.mark.parametrize("idiom", TOLD)
def test_at_real_sizes_a_length_of_this_run_is_refused(idiom):
    cells = [cell for cell in balanced_cells(REAL, asks=False) if cell.idiom == idiom]
    taken = {cell: found for cell in cells if (found := start(*cell)).word != "refused" and not named(cell)}
    assert cells
    assert not taken


def named(cell):
    """Whether the page says that a length of this scheduler is not always told."""
    return cell.name in SAID[cell.idiom, cell.interval][family(cell.name)].partition("; not ")[2].split(", ")


def test_the_page_has_every_idiom():
    assert list(SAID) == [(idiom, interval) for idiom, its in IDIOMS.items() for interval in its.intervals()]
    for (idiom, _), of in SAID.items():
        if IDIOMS[idiom].asks:
            assert set(of.values()) <= {"equal", "–"}
        else:
            assert all(words.startswith("refused") for words in of.values())


def test_every_scheduler_and_idiom_meets_every_share_and_batch():
    for batches, asks in ((SMALL, True), (REAL, True), (REAL, False)):
        cells = balanced_cells(batches, asks=asks)
        for part in ("name", "idiom"):
            for name in {getattr(cell, part) for cell in cells}:
                met = [cell for cell in cells if getattr(cell, part) == name]
                if len(met) >= len(SHARES) * len(batches) - len(batches):
                    assert {cell.share for cell in met} == set(SHARES)
                    assert {cell.batches for cell in met} == set(batches)


RESUMED = ("LambdaLR of a partial", "SequentialLR", "OneCycleLR", "told the epoch or update")


@pytest.mark.parametrize("cell", cells_to_resume(RESUMED), ids=lambda cell: "-".join(map(str, cell[:2])))
def test_a_run_resumes_from_any_update_bit_for_bit(cell, tmp_path):
    different, updates = different_resumes(cell, tmp_path, points=2, seed=len(cell.name) + int(10 * cell.share))
    assert updates > 2
    assert different == []
