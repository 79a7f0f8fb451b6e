"""One check of integers, one of numbers, one of choices, and one of arguments with a new name."""

import math

import numpy as np
import pytest
import torch

from lightning_gap.checks import check_choice, check_integer, check_number, renamed


@pytest.mark.parametrize(
    ("value", "least", "error", "message"),
    [
        (2.0, 1, TypeError, "n must be an int, got 2.0: the rows"),
        (True, 1, TypeError, "n must be an int, got True"),
        ("5", 1, TypeError, "n must be an int, got '5'"),
        (0, 1, ValueError, "n must be at least 1, got 0: the rows"),
        (-1, 0, ValueError, "n must be at least 0, got -1"),
    ],
)
def test_integers(value, least, error, message):
    with pytest.raises(error, match=message):
        check_integer("n", value, least, "the rows")
    assert check_integer("n", 3, least) == 3


@pytest.mark.parametrize("value", [0.5, 2, np.float32(0.5), np.int64(2), torch.tensor(0.5), torch.tensor([0.5])])
def test_numbers_become_plain_floats(value):
    assert type(check_number("x", value)) is float
    assert check_number("x", value, above=0) == float(value)


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (math.nan, {}, "x must be a finite number, got nan"),
        ("1", {}, "x must be a finite number, got '1'"),
        (True, {}, "x must be a finite number, got True"),
        (torch.ones(2), {}, "x must be a finite number, got tensor"),
        (0.0, {"above": 0}, "x must be a positive finite number, got 0.0"),
        (1, {"above": 1}, "x must be a finite number above 1, got 1"),
        (-1, {"least": 0}, "x must be a finite number of at least 0, got -1"),
    ],
)
def test_other_numbers_are_refused(value, bounds, message):
    with pytest.raises(ValueError, match=message):
        check_number("x", value, **bounds)


def test_choices():
    check_choice("shape", "round", ("round", "flat"))
    with pytest.raises(ValueError, match="shape must be one of round, flat, got 'square'"):
        check_choice("shape", "square", ("round", "flat"))


def test_new_names():
    assert renamed("old", "new", None, None) is None
    assert renamed("old", "new", None, 2) == 2
    with pytest.warns(DeprecationWarning, match="old is called new now: write new=1"):
        assert renamed("old", "new", 1, None) == 1
    with pytest.raises(TypeError, match="old is the old name of new: give new alone"):
        renamed("old", "new", 1, 2)
