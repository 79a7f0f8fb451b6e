"""Conditions that are held out whole: which they are, and which rows of a side go with them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_gap.monge.samples.combinations import Combinations, chosen_names, condition_names
from lightning_gap.monge.samples.draws import Endless
from lightning_gap.monge.samples.features import listed
from lightning_gap.monge.samples.given import Side

if TYPE_CHECKING:
    from lightning_gap.monge.samples.splits import SplitRule

__all__ = ["combinations_of", "held_conditions_of", "names_of", "rows_of_held"]

Array = NDArray[Any]


def combinations_of(sides: Sequence[Side | Endless]) -> Combinations | None:
    """Return the combinations of several columns that are the sides' conditions, if they are that."""
    found = [side.label_columns for side in sides if isinstance(side, Side)]
    plain = any(isinstance(side, Side) and side.conditions is not None and side.label_columns is None for side in sides)
    combinations = Combinations.of_sides(found)
    if combinations is not None and plain:
        raise ValueError("conditions: one side has columns by name, and another one labels: give both by name")
    return combinations


def names_of(sides: Sequence[Side | Endless], combinations: Combinations | None) -> tuple[str, ...]:
    """Return the names of all conditions, in order."""
    if combinations is not None:
        return tuple(combinations.of)
    return condition_names(side.conditions for side in sides if isinstance(side, Side))


def held_conditions_of(sides: Sequence[Side | Endless], val: Any, test: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the conditions that ``val_conditions`` and ``test_conditions`` hold out."""
    if val is None and test is None:
        return (), ()
    combinations = combinations_of(sides)
    names = names_of(sides, combinations)
    if not names:
        raise ValueError("val_conditions and test_conditions need conditions: give conditions= or condition_key=")
    of_val, of_test = (
        chosen_names(f"{stage}_conditions", given, names, combinations)
        for stage, given in (("val", val), ("test", test))
    )
    if both := [name for name in of_val if name in of_test]:
        raise ValueError(f"val_conditions and test_conditions both hold out {both[0]!r}: hold it out for one of them")
    if len(of_val) + len(of_test) >= len(names):
        raise ValueError(f"val_conditions and test_conditions hold out all conditions ({listed(names, 12)}): leave one")
    return of_val, of_test


def rows_of_held(
    side: Side, rule: "SplitRule", combinations: Combinations | None
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return by stage which ``(n,)`` rows go with its conditions, and which serve others, too, and so are shared."""
    n, held, shared = len(side.samples), {}, {}
    stages = [stage for stage in ("test", "val") if rule.conditions(stage)]
    serves = _serves(side, combinations) if stages else {}
    for stage in stages:
        of_stage = set(rule.conditions(stage))
        if side.conditions is None:
            held[stage], shared[stage] = np.zeros(n, dtype=bool), np.ones(n, dtype=bool)
            continue
        whole = [own for own, names in serves.items() if names and names <= of_stage]
        partly = [own for own, names in serves.items() if names & of_stage and not names <= of_stage]
        held[stage], shared[stage] = np.isin(side.conditions, whole), np.isin(side.conditions, partly)
    return held, shared


def _serves(side: Side, combinations: Combinations | None) -> dict[str, set[str]]:
    """Return which conditions the rows of each of a side's own labels serve."""
    if side.conditions is None:
        return {}
    own = np.unique(side.conditions).tolist()
    if combinations is None or side.label_columns is None:
        return {name: {name} for name in own}
    found: dict[str, set[str]] = {name: set() for name in own}
    for name in combinations.of:
        found.get(combinations.own_name(name, side.label_columns.names), set()).add(name)
    return found
