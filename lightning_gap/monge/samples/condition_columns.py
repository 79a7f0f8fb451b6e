"""The encoding of conditions of named columns, made from what the data have of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_gap.monge.samples.combinations import Combinations
from lightning_gap.monge.samples.condition_encoding import ConditionEncoding
from lightning_gap.monge.samples.conditions import named_vectors, stacked_vectors
from lightning_gap.monge.samples.features import listed
from lightning_gap.monge.samples.files.read import is_file
from lightning_gap.monge.samples.splits import Request

__all__ = ["encoding_of"]

Vectors = dict[str, list[float]]


def encoding_of(
    combinations: Combinations, trained: Sequence[str], held: Sequence[str], request: Request
) -> ConditionEncoding:
    """Return the encoding of the columns, fitted on the conditions that are trained on, and say what it is."""
    embeddings = _embeddings(combinations, request.condition_embeddings)
    kinds: list[str | None] = []
    for name in combinations.columns:
        given, numeric = request.condition_kinds.get(name), name in combinations.numeric
        if given in ("number", "log") and not numeric:
            raise ValueError(
                f"condition_key[{name!r}]={given!r}, and the column holds texts: correct it, or 'category'"
            )
        kinds.append(given if given is not None or numeric else "category")
    encoding = ConditionEncoding.fit(
        combinations.columns,
        kinds,
        [combinations.of[name] for name in trained],
        others=[combinations.of[name] for name in held],
        embeddings=embeddings,
    )
    rank_zero_info(f"conditions are vectors of {encoding.dim} numbers: {encoding.describe()}")
    return encoding


def _embeddings(combinations: Combinations, given: Any) -> dict[str, Vectors]:
    """Return the vectors by name, by column; all vectors of a column are checked."""
    if given is None:
        return {}
    argument = "condition_embeddings"
    if _by_column(given):
        if unknown := [name for name in given if name not in combinations.columns]:
            raise ValueError(
                f"{argument} is for the column {unknown[0]!r}, and the conditions have {listed(combinations.columns)}"
            )
        return {name: _checked(f"{argument}[{name!r}]", table, combinations, name) for name, table in given.items()}
    texts = [name for name in combinations.columns if name not in combinations.numeric] or list(combinations.columns)
    table = named_vectors(argument, given)
    if len(texts) > 1:
        places = {name: combinations.columns.index(name) for name in texts}
        texts = [name for name in texts if all(row[places[name]] in table for row in combinations.of.values())]
    if len(texts) != 1:
        raise ValueError(
            f"{argument} could be of any of the columns {listed(combinations.columns)}: say of which, as in "
            f"{argument}={{{combinations.columns[0]!r}: table}}"
        )
    return {texts[0]: _checked(argument, table, combinations, texts[0])}


def _by_column(given: Any) -> bool:
    """Return whether embeddings are given column by column."""
    return isinstance(given, Mapping) and any(
        is_file(table) or isinstance(table, Mapping) or (hasattr(table, "columns") and hasattr(table, "index"))
        for table in given.values()
    )


def _checked(argument: str, given: Any, combinations: Combinations, column: str) -> Vectors:
    table = named_vectors(argument, given)
    place = combinations.columns.index(column)
    needed = sorted({row[place] for row in combinations.of.values()})
    names = [*needed, *(name for name in table if name not in needed)]
    return dict(zip(names, stacked_vectors(argument, table, names).tolist(), strict=True))
