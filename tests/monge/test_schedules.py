"""Schedules of a map's training."""

import pytest

from lightning_gap.monge.schedules import Anneal


@pytest.mark.parametrize(("shape", "middle"), [("geometric", 2.0), ("linear", 2.5), ("cosine", 2.5)])
def test_it_goes_from_start_to_end_and_stays(shape, middle):
    anneal = Anneal(4.0, 1.0, updates=10, shape=shape)
    assert [anneal(t) for t in (0, 5, 10, 1000)] == pytest.approx([4.0, middle, 1.0, 1.0])
    values = [anneal(t) for t in range(12)]
    assert values == sorted(values, reverse=True)


def test_it_is_made_again_from_its_arguments():
    anneal = Anneal(0.5, 2.0, updates=7, shape="cosine")
    assert Anneal(**anneal.hparams) == anneal


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"start": 0.0}, ValueError, "start must be a finite number, positive for shape='geometric', got 0.0"),
        ({"end": float("nan")}, ValueError, "end must be a finite number"),
        ({"start": -1.0, "shape": "linear"}, ValueError, "start must be a finite number, of at least 0"),
        ({"updates": 0}, ValueError, "updates must be at least 1, got 0"),
        ({"updates": 1.5}, TypeError, "updates must be an int, got 1.5"),
        ({"shape": "step"}, ValueError, "shape must be one of geometric, linear, cosine, got 'step'"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Anneal(**{"start": 1.0, "end": 2.0, "updates": 3, **arguments})
