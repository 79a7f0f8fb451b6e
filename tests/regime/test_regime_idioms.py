"""Lengths from wherever scripts take them, under LargeBatchRegime: the reference run's rates, or refused."""

import pytest
from idiom_page import PAGE, family, read
from idiom_resumes import cells_to_resume, different_resumes
from idiom_scripts import outcome, start
from regime_idioms import IDIOMS, INTERVALS, REAL, SHARES, SMALL, balanced_cells

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


def parts_of(idioms, every):
    """Mark: a part of the schedulers for each idiom, others for the next one; all of them, which take minutes, slow."""
    cases = [(idiom, every) for idiom in idioms]
    return pytest.mark.parametrize(
        ("idiom", "every"), [*cases, *(pytest.param(idiom, 1, marks=pytest.mark.slow) for idiom in idioms)]
    )


def cells_of(idiom, every, idioms, **which):
    cells = [cell for cell in balanced_cells(**which) if cell.idiom == idiom]
    return cells[idioms.index(idiom) % min(every, len(cells)) :: every]


@parts_of(ASKING, 6)
def test_a_length_that_is_asked_for_is_the_reference_runs(idiom, every):
    cells = cells_of(idiom, every, ASKING)
    different = {cell: found for cell in cells if (found := outcome(*cell)).word != "equal"}
    assert cells
    assert not different


@parts_of(AT_REAL_SIZES, 3)
def test_at_real_sizes_a_length_that_is_asked_for_is_not_refused(idiom, every):
    cells = cells_of(idiom, every, AT_REAL_SIZES, batches=REAL)
    different = {cell: found for cell in cells if (found := start(*cell)).word != "equal"}
    assert cells
    assert not different


@parts_of(TOLD, 3)
def test_at_real_sizes_a_length_of_this_run_is_refused(idiom, every):
    cells = cells_of(idiom, every, TOLD, batches=REAL, asks=False)
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


def test_the_parts_have_every_scheduler_with_several_idioms():
    for idioms, every, which in (
        (ASKING, 6, {"batches": SMALL}),
        (AT_REAL_SIZES, 3, {"batches": REAL}),
        (TOLD, 3, {"batches": REAL, "asks": False}),
    ):
        met = [cell for idiom in idioms for cell in cells_of(idiom, every, idioms, **which)]
        whole = {cell.name for idiom in idioms for cell in cells_of(idiom, 1, idioms, **which)}
        for name in whole:
            assert len({cell.idiom for cell in met if cell.name == name}) >= 2, name
        for batches in which["batches"]:
            assert any(cell.batches == batches for cell in met)


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


# Of each schedule every share, by epochs and by updates in turns; those between are slow.
CELLS = [
    pytest.param(cell, id="-".join(map(str, cell[:2])), marks=[pytest.mark.slow] if odd % 2 else [])
    for cell in cells_to_resume(RESUMED)
    for odd in [RESUMED.index(cell.name) + SHARES.index(cell.share) + INTERVALS.index(cell.interval)]
]


@pytest.mark.parametrize("cell", CELLS)
def test_a_run_resumes_from_any_update_bit_for_bit(cell, tmp_path):
    different, updates = different_resumes(cell, tmp_path, points=2, seed=len(cell.name) + int(10 * cell.share))
    assert updates > 2
    assert different == []
