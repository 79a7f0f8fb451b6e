"""Conditions of several columns, such as drug and dose: their names, and which rows of a side serve which."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lightning_gap.checks import check_choice
from lightning_gap.monge.samples.features import listed
from lightning_gap.monge.samples.files.table import as_texts

__all__ = [
    "Combinations",
    "LabelColumns",
    "as_columns",
    "chosen_names",
    "condition_names",
    "key_or_labels",
    "left_out",
    "name_of",
    "named_rows",
    "rows_of_codes",
]

Array = NDArray[Any]
T = TypeVar("T")
# What a column may be said to hold.
_KINDS = ("category", "number", "log")


def name_of(texts: Iterable[str]) -> str:
    """Return the name of a combination."""
    return ", ".join(texts)


def _named(columns: Sequence[str], rows: Iterable[tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Return combinations by their names, each of which must be of one."""
    named: dict[str, tuple[str, ...]] = {}
    for row in rows:
        if named.setdefault(name_of(row), row) != row:
            raise ValueError(
                f"{row!r} and {named[name_of(row)]!r} of the columns {listed(columns)} have one name, "
                f"{name_of(row)!r}, since values are joined by ', ': replace the commas within values, as by '+'"
            )
    return named


def named_rows(columns: Mapping[str, Array]) -> tuple[Array, dict[str, tuple[str, ...]]]:
    """Return which combination of texts each row is of, as ``(n,)`` numbers, and the combinations by name."""
    codes, first = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    for k, texts in enumerate(columns.values()):
        values, own = np.unique(texts, return_inverse=True)
        # Numbered anew after each column, so that products stay small.
        joint = own if k == 0 else codes * len(values) + own
        _, first, codes = np.unique(joint, return_index=True, return_inverse=True)
    return codes, _named(tuple(columns), [tuple(str(texts[i]) for texts in columns.values()) for i in first])


def rows_of_codes(codes: Array, count: int) -> list[Array]:
    """Return the rows of each of so many numbers, in increasing order, by one sort."""
    return np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes, minlength=count))[:-1])


def condition_names(labels: Iterable[Array | None]) -> tuple[str, ...]:
    """Return all names in order: by number if all are numbers, by text otherwise."""
    names = {str(name) for given in labels if given is not None for name in np.unique(given)}
    try:
        return tuple(sorted(names, key=float))
    except ValueError:
        return tuple(sorted(names))


def _key_columns(key: str | Sequence[str] | Mapping[str, str] | None) -> dict[str, str | None]:
    """Return the columns that a ``condition_key`` names, each with its kind as far as that is given."""
    if key is None:
        return {}
    kinds: dict[str, str | None] = {}
    kinds.update(key if isinstance(key, Mapping) else dict.fromkeys([key] if isinstance(key, str) else key))
    if not kinds or not all(isinstance(name, str) for name in kinds):
        raise TypeError(f"condition_key must be a column, or a list of columns, got {key!r}")
    if not isinstance(key, str | Mapping) and len(kinds) < len(key):
        raise ValueError(f"condition_key names a column twice: {key!r}")
    for name, kind in kinds.items():
        if kind is not None:
            check_choice(f"condition_key[{name!r}]", kind, _KINDS)
    return kinds


def key_or_labels(
    conditions: Any, key: Any, vectors: Any, embeddings: Any
) -> tuple[Any, dict[str, str | None], str | None]:
    """Return labels, or columns with their kinds, and how a single column of labels is called where it has vectors."""
    for first, second, names in (
        (conditions, key, "conditions and condition_key"),
        (vectors, embeddings, "condition_vectors and condition_embeddings"),
    ):
        if first is not None and second is not None:
            raise ValueError(f"{names} both say what the conditions are: give one of them")
    if isinstance(key, str) and embeddings is None:
        return key, {}, None
    if key is not None and vectors is not None:
        raise ValueError("condition_vectors are by the names of conditions=; condition_key takes condition_embeddings")
    column = None if embeddings is None else conditions if isinstance(conditions, str) else "condition"
    return conditions, _key_columns(key), column


def as_columns(given: Any) -> dict[str, Any] | None:
    """Return the columns of labels that are given as a table, by name; ``None`` for labels of one column."""
    if isinstance(given, Mapping):
        return {str(name): values for name, values in given.items()}
    if hasattr(given, "columns") and hasattr(given, "iloc"):
        return {str(name): given[name].to_numpy() for name in given.columns}
    return None


def _numeric(values: Array) -> bool:
    if values.dtype.kind in "fiu":
        return True
    there = [value for value in values.ravel().tolist() if value is not None and value == value]
    return values.dtype == object and all(isinstance(v, Real) and not isinstance(v, bool) for v in there)


@dataclass(frozen=True, eq=False)
class LabelColumns:
    """Labels of a side's rows in several columns."""

    values: Mapping[str, Array]  # (n,) texts of each column
    numeric: frozenset[str]  # columns that were numbers

    @classmethod
    def of(cls, values: Mapping[str, Array]) -> "LabelColumns":
        """Return the labels as texts, and which columns were numbers."""
        numeric = frozenset(name for name, labels in values.items() if _numeric(labels))
        return cls({name: as_texts(labels) for name, labels in values.items()}, numeric)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self.values)

    def only(self, names: Collection[str]) -> "LabelColumns | None":
        """Return some of the columns; ``None`` where none is left."""
        kept = {name: texts for name, texts in self.values.items() if name in names}
        return LabelColumns(kept, self.numeric & set(kept)) if kept else None

    def combined(self) -> tuple[Array, dict[str, tuple[str, ...]]]:
        """Return the ``(n,)`` names of the rows' combinations, and the texts of each combination."""
        codes, named = named_rows(self.values)
        return np.array(list(named), dtype=str)[codes], named


@dataclass(frozen=True, eq=False)
class Combinations:
    """The combinations of values that are conditions, in order, and their columns."""

    columns: tuple[str, ...]
    of: Mapping[str, tuple[str, ...]]  # texts by column, by the combination's name
    numeric: frozenset[str]  # columns that are numbers on every side

    @classmethod
    def of_sides(cls, sides: Sequence[LabelColumns | None]) -> "Combinations | None":
        """Return the combinations of the sides that have all columns; ``None`` where no side has columns."""
        labelled = [side for side in sides if side is not None]
        if not labelled:
            return None
        whole = max(labelled, key=lambda side: len(side.names))
        for side in labelled:
            unknown = [name for name in side.names if name not in whole.names]
            if unknown:
                raise ValueError(
                    f"conditions: a side has the column {unknown[0]!r}, and another one {listed(whole.names)}: the "
                    "columns of one must be among those of the other"
                )
        numeric = frozenset(
            name for name in whole.names if all(name in side.numeric for side in labelled if name in side.names)
        )
        rows: list[tuple[str, ...]] = []
        for side in labelled:
            if set(side.names) == set(whole.names):
                order = [side.names.index(name) for name in whole.names]
                rows += [tuple(texts[i] for i in order) for texts in side.combined()[1].values()]
        found = _named(whole.names, rows)
        for side in labelled:  # one with fewer columns serves combinations by its own names of them
            of = [whole.names.index(name) for name in side.names]
            _named(side.names, [*side.combined()[1].values(), *(tuple(row[i] for i in of) for row in rows)])
        numbers = [name in numeric for name in whole.names]

        def key(item: tuple[str, tuple[str, ...]]) -> list[tuple[float, str]]:
            return [(float(text), "") if number else (0.0, text) for text, number in zip(item[1], numbers, strict=True)]

        return cls(whole.names, dict(sorted(found.items(), key=key)), numeric)

    def own_name(self, name: str, columns: Sequence[str]) -> str:
        """Return what a side that has some of the columns calls a combination."""
        texts = dict(zip(self.columns, self.of[name], strict=True))
        return name_of(texts[column] for column in columns)

    def served(self, by: Mapping[str, T], columns: Sequence[str]) -> dict[str, T]:
        """Return by the combinations what a side has by its own names."""
        own = {name: self.own_name(name, columns) for name in self.of}
        return {name: by[mine] for name, mine in own.items() if mine in by}


def chosen_names(argument: str, given: Any, names: Sequence[str], combinations: Combinations | None) -> tuple[str, ...]:
    """Return the conditions that a list asks for: by name, by the value of a category, or by values of columns."""
    if given is None:
        return ()
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{argument} must be a list of conditions, got {given!r}: write [{given!r}]")
    found: list[str] = []
    entries = [given] if isinstance(given, Mapping) else list(given)
    for entry in entries:
        here = _matching(argument, entry, names, combinations)
        if not here:
            raise ValueError(f"{argument} names {entry!r}, which is no condition; there is {listed(names, 12)}")
        found += [name for name in here if name not in found]
    if not found:
        raise ValueError(f"{argument} is empty: name a condition, or leave it out")
    if len(found) == len(names):
        raise ValueError(f"{argument} holds out all conditions ({listed(names, 12)}): leave one to train on")
    return tuple(found)


def left_out(names: Sequence[str], combinations: Combinations | None, by: str | None) -> dict[str, tuple[str, ...]]:
    """Return which conditions are left out together: each alone, or those of one value of a column, by that."""
    if by is None:
        return {name: (name,) for name in names}
    if combinations is None or by not in combinations.columns:
        known = "no columns" if combinations is None else f"the columns {listed(combinations.columns)}"
        raise ValueError(f"by={by!r}: the conditions have {known}")
    place, found = combinations.columns.index(by), dict[str, tuple[str, ...]]()
    for name in names:
        value = combinations.of[name][place]
        found[value] = (*found.get(value, ()), name)
    return found


def _matching(argument: str, entry: Any, names: Sequence[str], combinations: Combinations | None) -> list[str]:
    if isinstance(entry, Mapping):
        if combinations is None or not set(entry) <= set(combinations.columns):
            known = "no columns" if combinations is None else listed(combinations.columns)
            raise ValueError(f"{argument} asks for {dict(entry)!r}, and the conditions have {known}")
        wanted = {
            column: as_texts(np.array(list(v) if isinstance(v, list | tuple) else [v], dtype=object)).tolist()
            for column, v in entry.items()
        }
        return [
            name
            for name, texts in combinations.of.items()
            if all(text in wanted.get(column, [text]) for column, text in zip(combinations.columns, texts, strict=True))
        ]
    text = str(as_texts(np.array([entry], dtype=object))[0])
    if text in names or combinations is None:
        return [text] if text in names else []
    categories = [column not in combinations.numeric for column in combinations.columns]
    return [
        name
        for name, texts in combinations.of.items()
        if any(own == text and category for own, category in zip(texts, categories, strict=True))
    ]
