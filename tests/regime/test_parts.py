"""An update in parts, a pass in updates, and where the reference run is meanwhile: properties over many inputs."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gap.regime.parts import PassClock, parts_of_update, updates_of_pass


@given(
    begins=st.integers(0, 50),
    total=st.integers(1, 200),
    ranks=st.integers(1, 6),
    most=st.none() | st.integers(1, 40),
)
def test_parts_hold_every_sample_once_and_weights_make_the_mean(begins, total, ranks, most):
    each = [
        list(parts_of_update(begins, begins + total, total, epoch=0, rank=rank, ranks=ranks, most=most))
        for rank in range(ranks)
    ]
    counts = {len(parts) for parts in each}
    assert len(counts) == 1  # every device makes as many passes
    parts = [part for own in each for part in own]
    held = [range(part.first, part.first + part.size) for part in parts if part.weight]
    assert sorted(sample for own in held for sample in own) == list(range(begins, begins + total))
    # The mean over parts and devices of weighted means is the mean over samples.
    share = 1 / (counts.pop() * ranks)
    for part in parts:
        assert part.weight * share == pytest.approx(0 if not part.weight else part.size / total)
    assert sum(part.weight for part in parts) * share == pytest.approx(1)
    assert all(part.size <= (most or total) for part in parts)
    for own in each:
        assert [part.opens for part in own] == [True] + [False] * (len(own) - 1)
        assert [part.closes for part in own] == [False] * (len(own) - 1) + [True]


@given(
    samples=st.integers(1, 200),
    base=st.integers(1, 40),
    batches=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    stop=st.integers(0, 100),
)
def test_updates_cover_the_pass_from_any_place_on(samples, base, batches, stop):
    clock = PassClock(samples, base)

    def batch_at(seen):
        return batches[min(seen // 30, len(batches) - 1)]

    whole = list(updates_of_pass(clock, batch_at, 0, 0))
    assert whole[0][0] == 0
    assert whole[-1][1] == samples
    assert all(before[1] == after[0] for before, after in pairwise(whole))
    begins = whole[min(stop, len(whole) - 1)][0]
    rest = list(updates_of_pass(clock, batch_at, 0, begins))
    assert rest == [update for update in whole if update[0] >= begins]


@given(samples=st.integers(1, 100), base=st.integers(1, 30), update=st.integers(0, 300))
def test_a_place_and_an_update_are_each_others(samples, base, update):
    clock = PassClock(samples, base)
    epoch, position = clock.place(update)
    assert clock.update(epoch, position) == update
    assert position < samples
    assert clock.update(epoch, samples) == (epoch + 1) * clock.updates_per_pass


def test_a_clock_without_a_length_counts_on():
    clock = PassClock(None, 8)
    assert clock.update(0, 800) == 100
    assert clock.place(100) == (0, 800)
