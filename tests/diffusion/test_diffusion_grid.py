from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gap.diffusion import constant_lr_segments, next_log_update
from lightning_gap.diffusion.grid import longest_segment


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 50), st.integers(0, 20_000))
def test_log_grid_is_absolute(points_per_decade, t):
    grid = sorted({round(10 ** (k / points_per_decade)) for k in range(5 * points_per_decade + 1)})
    assert next_log_update(t, points_per_decade) == min(g for g in grid if g > t)


def test_constant_lr_segments():
    assert constant_lr_segments([]) == []
    assert constant_lr_segments([0.1] * 4) == [slice(0, 4)]
    warm_then_drop = [0.02, 0.06, 0.1, 0.1, 0.1, 0.01]
    assert constant_lr_segments(warm_then_drop) == [slice(0, 1), slice(1, 2), slice(2, 5), slice(5, 6)]
    drift = [0.1 * (1 - 3e-10 * i) for i in range(12)]
    assert len(constant_lr_segments(drift)) == 3, "a slow drift must not pass as constant"


def test_the_segment_that_spans_most_decades():
    assert longest_segment([1, 10, 100, 1000, 2000], [0.1, 0.1, 0.1, 0.01, 0.01]) == slice(0, 3)
