"""Parts of tables: what runs each time has every value, and the slow suite the rest."""

from itertools import combinations, product

import pytest
from checkered import checkered


@pytest.mark.parametrize("lengths", [(2, 2), (5, 3), (2, 2, 2), (4, 3, 4)])
def test_a_part_has_every_value_and_with_the_slow_rest_every_cell(lengths):
    axes = {name: range(length) for name, length in zip("abc", lengths, strict=False)}
    names, cells = checkered(**axes).args
    assert names == tuple(axes)
    assert [cell.values for cell in cells] == list(product(*axes.values()))
    fast = [cell.values for cell in cells if not cell.marks]
    assert all(mark.name == "slow" for cell in cells for mark in cell.marks)
    assert len(fast) <= (len(cells) + 1) // 2
    together = 1 if len(axes) == 2 else 2
    for places in combinations(range(len(axes)), together):
        met = {tuple(values[at] for at in places) for values in fast}
        assert met == set(product(*(range(lengths[at]) for at in places)))
