"""Tables of parameters of which a part runs each time, and the rest in the slow suite."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest


def checkered(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize by every other cell of a table, as the black squares of a board; the white ones are slow.

    Each value of an axis is on a black square, and where there are three axes, each value of one with each of another.
    """
    cells = []
    for place in product(*(range(len(values)) for values in axes.values())):
        values = [values[at] for values, at in zip(axes.values(), place, strict=True)]
        cells.append(pytest.param(*values, marks=[pytest.mark.slow] if sum(place) % 2 else []))
    return pytest.mark.parametrize(tuple(axes), cells)
