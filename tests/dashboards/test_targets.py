"""When a target is held, against a slow twin, and the profile over runs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gap.dashboards.targets import Target, first_held, performance_profile, reached

ACCURACY, LOSS = Target("val_acc", ">=", 0.5), Target("loss", "<=", 0.5)
curves = st.lists(st.floats(0, 1), min_size=0, max_size=30)


@given(curves, st.integers(1, 5))
def test_held_is_the_first_of_so_many_points_in_a_row(values, hold):
    at = list(range(10, 10 + len(values)))
    expected = None
    for i in range(len(values) - hold + 1):
        if all(value >= 0.5 for value in values[i : i + hold]):
            expected = at[i]
            break
    found = first_held(at, values, ACCURACY, hold=hold)
    assert (found is None) == (expected is None)
    if found is not None:
        assert expected - 1 <= found <= expected


@given(curves, st.integers(1, 5))
def test_less_is_better_is_the_mirror(values, hold):
    at = np.arange(len(values))
    mirrored = [1 - value for value in values]
    near = any(abs(value - 0.5) < 1e-9 for value in values)
    if not near:
        a, b = first_held(at, values, ACCURACY, hold=hold), first_held(at, mirrored, LOSS, hold=hold)
        assert (a is None and b is None) or a == pytest.approx(b, abs=1e-6)


def test_between_points_the_curve_is_straight():
    at = np.array([100, 200, 300, 400])
    assert first_held(at, 1 - at / 1000, Target("loss", "<=", 0.75), hold=1) == pytest.approx(250)
    # What starts there has no point before it.
    assert first_held(at, 1 - at / 1000, Target("loss", "<=", 0.95), hold=1) == 100


def test_touched_is_not_held():
    at, values = [1, 2, 3, 4, 5], [0.0, 0.6, 0.4, 0.3, 0.6]
    assert first_held(at, values, ACCURACY) is None
    assert reached(values, ACCURACY)
    assert first_held(at, values, ACCURACY, hold=1) == pytest.approx(1 + 0.5 / 0.6)
    assert first_held(at, [0.0, 0.6, np.nan, 0.6, 0.6], ACCURACY, hold=2) == 4


def test_a_noisy_loss_is_held_by_its_mean():
    at = np.arange(40)
    noisy = np.where(at % 2, 0.2, 0.7)
    assert first_held(at, noisy, LOSS) is None
    assert first_held(at, noisy, LOSS, smooth=2) is not None


@pytest.mark.parametrize("text", ["val_acc>=0.9", " val_acc >= 0.9 ", "val_acc>=9e-1"])
def test_a_target_is_read(text):
    assert Target.parse(text) == Target("val_acc", ">=", 0.9)


@pytest.mark.parametrize("text", ["val_acc", "val_acc=0.9", "val_acc>0.9", ">=0.9", "val_acc>=high", "val_acc>=nan"])
def test_what_is_no_target_is_refused(text):
    with pytest.raises(ValueError, match="METRIC>=VALUE"):
        Target.parse(text)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="hold"):
        first_held([1], [1], LOSS, hold=0)
    with pytest.raises(ValueError, match="one length"):
        first_held([1, 2], [1], LOSS)
    with pytest.raises(ValueError, match="best has 2"):
        performance_profile([[1.0]], [1.0, 2.0])
    with pytest.raises(ValueError, match="empty"):
        performance_profile([[]], [1.0])


@given(st.lists(st.one_of(st.none(), st.floats(1, 100)), min_size=1, max_size=12), st.floats(1, 200))
def test_the_profile_is_the_share_within_a_factor(costs, factor):
    factors, shares = performance_profile([costs], [1.0])
    share = shares[factors <= factor][-1] if (factors <= factor).any() else 0
    assert share == pytest.approx(sum(cost is not None and cost <= factor for cost in costs) / len(costs))


def test_targets_count_alike_whatever_they_cost():
    factors, shares = performance_profile([[10, 20], [1000, 4000]], [10, 1000])
    assert factors.tolist() == [1, 2, 4]
    assert shares.tolist() == [0.5, 0.75, 1.0]
