"""How large a batch is after some samples, by each schedule."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gap.regime import BatchSchedule, BatchSteps, NoiseBatches, PlateauBatches, SeesawBatches
from lightning_gap.regime.batches import batch_schedule
from lightning_gap.regime.batches.seesaw import seesaw_saving


@given(starts=st.lists(st.integers(1, 1000), unique=True, max_size=5), seen=st.integers(0, 1200))
def test_steps_are_the_last_that_has_begun(starts, seen):
    steps = [(0, 1), *((start, 2 + at) for at, start in enumerate(sorted(starts)))]
    wanted = [batch for start, batch in steps if start <= seen][-1]
    assert BatchSteps(steps).batch_at(seen) == wanted


@pytest.mark.parametrize(
    ("shape", "saved"),
    [
        (lambda x: math.cos(math.pi / 2 * x), 1 - 2 / math.pi),
        (lambda x: (1 + math.cos(math.pi * x)) / 2, 0.5),
        (lambda x: 1 - x, 0.5),
        (lambda x: min(1.0, 10 * x), 0.0),  # a warm-up saves nothing
        (lambda x: 1.0 if x < 0.5 else 0.1, 0.45),
    ],
)
def test_what_a_seesaw_saves(shape, saved):
    found = seesaw_saving([shape((i + 0.5) / 100_000) for i in range(100_000)])
    assert found == pytest.approx(saved, abs=1e-4)


def test_a_seesaw_goes_back_where_the_rate_does():
    rates = [1.0, 2.0, 1.0, 0.5, 2.0]
    seesaw = SeesawBatches()
    seesaw.begin(8, lambda samples: (rates[samples], max(rates[: samples + 1])))
    assert [seesaw.batch_at(samples) for samples in range(5)] == [8, 8, 16, 32, 8]


def test_names_steps_functions_and_schedules_are_taken():
    assert isinstance(batch_schedule("seesaw"), SeesawBatches)
    assert isinstance(batch_schedule("plateau"), PlateauBatches)
    assert isinstance(batch_schedule("noise"), NoiseBatches)
    own = BatchSchedule()
    assert batch_schedule(own) is own
    assert batch_schedule(lambda samples: 2 * samples + 1).batch_at(4) == 9
    with pytest.raises(ValueError, match="gave 0 at 3"):
        batch_schedule(lambda samples: 0).batch_at(3)


def test_a_plateau_waits_as_torchs_does_and_goes_on_where_it_was():
    def begun():
        plateau = PlateauBatches("loss", factor=4, patience=1, cooldown=1)
        plateau.begin(8)
        return plateau

    losses = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.1]
    whole, sizes = begun(), []
    for at, loss in enumerate(losses):
        other = begun()
        other.load_state_dict(whole.state_dict())
        for rest in losses[at:]:
            other.observe({"loss": rest})
        whole.observe({"loss": loss})
        sizes.append(whole.batch_at(0))
        finals = other.batch_at(0)
    assert sizes == [8, 8, 32, 32, 32, 128, 128, 128, 512, 512]
    assert finals == 512
    with pytest.raises(ValueError, match="monitor='loss'"):
        whole.observe({"val_loss": 1.0})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PlateauBatches(mode="most"), "min, max"),
        (lambda: PlateauBatches(factor=1.0), "factor"),
        (lambda: PlateauBatches(patience=-1), "patience"),
        (lambda: NoiseBatches(share=0), "share"),
        (lambda: NoiseBatches(hysteresis=0.5), "hysteresis"),
    ],
)
def test_bad_arguments_of_schedules_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
