"""Conditions of named columns as they are asked for: by name, or by the values of the columns."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lightning_gap.monge.samples.combinations import as_columns
from lightning_gap.monge.samples.condition_encoding import ConditionEncoding
from lightning_gap.monge.samples.features import listed
from lightning_gap.monge.samples.files.table import as_texts

__all__ = ["vectors_asked_for"]

Row = tuple[str | Tensor, ...]


def vectors_asked_for(given: Any, n: int, encoding: ConditionEncoding) -> Tensor:
    """Return ``(n, p)`` vectors of one condition for all samples or one for each, and warn of untrained ones.

    ``given`` is a mapping or table with the columns of the encoding, a name such as ``"A, 10"`` or a value of the only
    column, a sequence of a value for each column, or ``n`` names, rows or mappings.
    """
    rows = _rows(given, n, encoding)
    if len(rows) not in (1, n):
        raise ValueError(f"condition holds {len(rows)} conditions for {n} samples: give one, or one for each")
    places: dict[Any, int] = {}
    distinct: list[Row] = []
    for row in rows:
        if (key := tuple(id(x) if isinstance(x, Tensor) else x for x in row)) not in places:
            places[key] = len(distinct)
            distinct.append(row)
    vectors = encoding.asked(distinct)
    if len(rows) == 1:
        return vectors.expand(n, -1)
    return vectors[[places[tuple(id(x) if isinstance(x, Tensor) else x for x in row)] for row in rows]]


def _rows(given: Any, n: int, encoding: ConditionEncoding) -> list[Row]:
    columns = as_columns(given)
    if columns is not None:
        return _by_column(columns, encoding)
    if isinstance(given, str) or np.ndim(given) == 0:
        return [_named(given, encoding)]
    if hasattr(given, "to_numpy"):
        given = given.to_numpy()
    entries = list(given)
    if entries and all(isinstance(entry, Mapping) for entry in entries):
        return [row for entry in entries for row in _by_column(entry, encoding)]
    if all(isinstance(entry, str) or np.ndim(entry) == 0 for entry in entries):
        # One value for each column, unless they are names of conditions.
        if len(encoding.names) > 1 and len(entries) == len(encoding.names) and not _all_named(entries, encoding):
            return [tuple(_texts(entries))]
        named = {entry: _named(entry, encoding) for entry in dict.fromkeys(entries)}
        return [named[entry] for entry in entries]
    return [_by_place(list(entry), encoding) for entry in entries]


def _by_column(columns: Mapping[str, Any], encoding: ConditionEncoding) -> list[Row]:
    missing = [name for name in encoding.names if name not in columns]
    if missing:
        raise ValueError(
            f"condition has no {listed(missing)}; the conditions of this map have the columns {listed(encoding.names)}"
        )
    found = [_column(columns[name], column) for name, column in zip(encoding.names, encoding.columns, strict=True)]
    lengths = {len(values) for values in found if len(values) > 1}
    if len(lengths) > 1:
        raise ValueError(f"condition: the columns have {' and '.join(map(str, sorted(lengths)))} entries: give as many")
    length = max(map(len, found))
    return list(zip(*(values * length if len(values) == 1 else values for values in found), strict=True))


def _column(given: Any, column: Mapping[str, Any]) -> list[str | Tensor]:
    """Return the values of a column, one or some."""
    if column["kind"] == "embedding" and _is_vectors(given):
        import torch

        vectors = torch.as_tensor(given, dtype=torch.float32, device="cpu")
        return list(vectors) if vectors.dim() == 2 else [vectors]
    if isinstance(given, Tensor):
        given = given.detach().cpu().numpy()
    if isinstance(given, str) or np.ndim(given) == 0:
        return list(_texts([given]))
    return list(_texts(given.to_numpy() if hasattr(given, "to_numpy") else given))


def _is_vectors(given: Any) -> bool:
    if isinstance(given, Tensor):
        return given.dim() > 0
    return not isinstance(given, str) and np.ndim(given) > 0 and np.asarray(given).dtype.kind == "f"


def _texts(values: Any) -> list[str]:
    array = values if isinstance(values, np.ndarray) else np.array(list(values), dtype=object)
    texts: list[str] = as_texts(array).tolist()
    if "" in texts:
        raise ValueError(f"condition is missing in row {texts.index('')}: give a value for each sample")
    return texts


def _by_place(values: Sequence[Any], encoding: ConditionEncoding) -> Row:
    if len(values) != len(encoding.names):
        raise ValueError(
            f"condition has {len(values)} values, for the columns {listed(encoding.names)}: give one for each, or, "
            "as a tensor, the vectors that the map takes"
        )
    return tuple(_texts(values))


def _all_named(entries: Sequence[Any], encoding: ConditionEncoding) -> bool:
    return all(isinstance(entry, str) and _split(entry, encoding) is not None for entry in entries)


def _named(given: Any, encoding: ConditionEncoding) -> Row:
    text = _texts([given])[0]
    row = _split(text, encoding)
    if row is None:
        raise ValueError(
            f"condition {text!r} does not tell {listed(encoding.names)}: give them in this order with commas between, "
            f"or {{{encoding.names[0]!r}: ...}}"
        )
    return row


def _split(text: str, encoding: ConditionEncoding) -> Row | None:
    """Return the parts of a name; a category with commas in it is found among the known ones."""
    parts: list[str] = []
    for i, column in enumerate(encoding.columns):
        if i == len(encoding.columns) - 1:
            return (*parts, text) if text else None
        known = [name for name in (*column.get("names", ()), *column.get("others", ())) if text.startswith(f"{name}, ")]
        part = max(known, key=len, default=text.partition(", ")[0])
        if part == text:
            return None
        parts.append(part)
        text = text[len(part) + 2 :]
    return None
