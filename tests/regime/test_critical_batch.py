"""The trade-off of updates and samples: its closed form, and what is found again in runs that obey it or do not."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gap.regime import (
    fit_critical_batch,
    samples_to_target,
    trade_off_at,
    updates_to_target,
)

positive = st.floats(1, 1e6)
BATCHES = [8, 32, 128, 512, 2048]


@given(positive, positive, positive)
def test_the_trade_off_is_mccandlishs(batch, s_min, e_min):
    updates, samples = updates_to_target(batch, s_min, e_min), samples_to_target(batch, s_min, e_min)
    assert samples == pytest.approx(batch * updates)
    # (S / S_min - 1)(E / E_min - 1) = 1, without the differences that cancel
    assert (updates - s_min) * (samples - e_min) == pytest.approx(s_min * e_min, rel=1e-3, abs=1e-6 * samples * updates)


@given(positive, positive, positive)
def test_one_run_and_its_noise_scale_fix_the_trade_off(batch, critical, updates):
    s_min, e_min = trade_off_at(critical, batch, updates)
    assert updates_to_target(batch, s_min, e_min) == pytest.approx(updates)
    assert e_min / s_min == pytest.approx(critical)
    assert updates_to_target(critical, s_min, e_min) == pytest.approx(2 * s_min)


@given(st.floats(1, 1e4), st.floats(16, 1024), st.lists(st.floats(1, 4096), min_size=3, max_size=6, unique=True))
@settings(max_examples=30, deadline=None)
def test_exact_runs_are_found_again(s_min, critical, batches):
    if max(batches) / min(batches) < 4 or not min(batches) < critical < max(batches):
        return
    fit = fit_critical_batch(batches, [updates_to_target(b, s_min, critical * s_min) for b in batches])
    for batch in (1, 64, 4096):
        assert fit.updates(batch) == pytest.approx(updates_to_target(batch, s_min, critical * s_min), rel=0.02)
        assert fit.samples(batch) == pytest.approx(batch * fit.updates(batch))


def test_every_batch_is_predicted_from_the_others():
    fit = fit_critical_batch(BATCHES, [updates_to_target(b, 100, 10_000) for b in BATCHES])
    assert set(fit.left_out) == set(map(float, BATCHES))
    assert max(map(abs, fit.left_out.values())) < 1e-4
    # A fit by hand to the others gives the error that is told.
    made = [1400.0, 420.0, 200.0, 130.0, 95.0]
    told = fit_critical_batch(BATCHES, made).left_out[128.0]
    others = fit_critical_batch([8, 32, 512, 2048], [1400.0, 420.0, 130.0, 95.0])
    assert told == pytest.approx(others.updates(128) / 200 - 1, rel=1e-9)


def test_a_run_that_went_astray_hardly_moves_the_fit():
    batches = np.repeat(BATCHES, 3)
    made = np.array([updates_to_target(b, 100, 10_000) for b in batches])
    made[4] *= 4  # one of three seeds
    assert fit_critical_batch(batches, made).critical_batch == pytest.approx(100, rel=0.1)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    draw, batches = np.random.default_rng(0), np.repeat(BATCHES, 2)
    exact = np.array([updates_to_target(b, 100, 10_000) for b in batches])
    held = 0
    for _ in range(40):
        low, high = fit_critical_batch(batches, exact * np.exp(draw.normal(0, 0.08, len(exact)))).intervals[
            "critical_batch"
        ]
        held += low < 100 < high
    assert held >= 34  # under 95 %, 34 of 40 or fewer come once in fifty times


@pytest.mark.parametrize(
    ("updates", "critical"), [([400, 200, 100], math.inf), ([400, 180, 70], math.inf), ([100, 100, 100], 0)]
)
def test_what_no_run_tells_is_said(updates, critical):
    fit = fit_critical_batch([8, 16, 32], updates)
    assert fit.critical_batch == critical
    assert set(fit.intervals.values()) == {(0.0, math.inf)}
    assert fit.updates(16) == pytest.approx(updates[1], rel=0.1)


def test_two_batches_fit_exactly_and_tell_no_error():
    fit = fit_critical_batch([32, 128], [300, 150])
    assert (fit.s_min, fit.e_min) == pytest.approx((100, 6400), rel=1e-6)
    assert fit.intervals == {}
    assert fit.left_out == {}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fit_critical_batch([8, 16], [100]), "2 and 1 entries"),
        (lambda: fit_critical_batch([8, 16], [100, math.nan]), "updates holds"),
        (lambda: fit_critical_batch([0, 16], [100, 50]), "batches holds"),
        (lambda: fit_critical_batch([8, 8], [100, 90]), "two or more"),
        (lambda: fit_critical_batch([8, 16], [100, 90], confidence=95), "confidence"),
        (lambda: updates_to_target(0, 1, 1), "batch=0"),
        (lambda: updates_to_target(8, -1, 1), "s_min=-1"),
        (lambda: updates_to_target(8, 0, 0), "both 0"),
        (lambda: trade_off_at(math.nan, 8, 100), "critical_batch=nan"),
        (lambda: trade_off_at(64, 8, 0), "updates=0"),
    ],
)
def test_what_makes_no_sense_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
