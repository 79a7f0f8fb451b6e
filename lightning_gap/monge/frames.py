"""Tables of data frames, and of the files that pandas reads."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_gap.monge.tables import Table, as_tensor, first_line, library, objects, there_is

__all__ = ["frame_table", "load_frame"]

Array = NDArray[Any]


def load_frame(
    title: str, path: Path, suffix: str | None, columns: Sequence[str] | None, labels: frozenset[str]
) -> Any:
    """Return a file as a data frame.

    Args:
        title: How messages call it.
        path: The file.
        suffix: Its kind.
        columns: The features that are read, beside the labels; all columns by default.
        labels: Names of labels.
    """
    pandas = library("pandas", title)
    separator = "\t" if suffix is not None and suffix.startswith(".tsv") else ","
    try:
        if suffix == ".parquet":
            names = library("pyarrow.parquet", title).read_schema(path).names
        else:
            names = pandas.read_csv(path, sep=separator, nrows=0).columns.tolist()
        wanted = names if columns is None else [name for name in names if name in {*map(str, columns), *labels}]
        _check_columns(title, columns, names)
        if suffix == ".parquet":
            return pandas.read_parquet(path, columns=None if columns is None else wanted, engine="pyarrow")
        return pandas.read_csv(path, sep=separator, usecols=wanted)
    except (ModuleNotFoundError, _NoColumnError):
        raise
    except Exception as error:
        raise ValueError(f"{title}: cannot read {str(path)!r}: {first_line(error)}") from error


class _NoColumnError(ValueError):
    """A table has no such column."""


def _check_columns(title: str, columns: Sequence[str] | None, names: Sequence[str]) -> None:
    for name in map(str, columns or ()):
        if name not in names:
            raise _NoColumnError(f"columns: {title} has no column {name!r}; {there_is(names)}")


def frame_table(title: str, frame: Any, columns: Sequence[str] | None, labels: frozenset[str]) -> Table:
    """Return the table of a data frame.

    Args:
        title: How messages call it.
        frame: The data frame.
        columns: Names of the features, in this order; by default all that are no labels.
        labels: Names of labels.
    """
    pandas = library("pandas", title)
    names = [str(name) for name in frame.columns]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{title} has two columns {twice!r}: rename one")
    frame = frame.set_axis(names, axis=1)
    if columns is None:
        # An unnamed first column is what pandas and R write of row names.
        features = [
            name for name in names if name not in labels and not re.fullmatch(r"Unnamed: 0|__index_level_0__", name)
        ]
    else:
        features = [str(name) for name in columns]
        _check_columns(title, features, names)
    if not features:
        raise ValueError(f"{title} has no columns of samples; {there_is(names)}")
    texts = [name for name in features if not pandas.api.types.is_numeric_dtype(frame[name].dtype)]
    if texts:
        listed = ", ".join(map(repr, texts[:5])) + (", ..." if len(texts) > 5 else "")
        raise TypeError(
            f"{title}: the columns {listed} hold no numbers: name those of the samples, as in columns=['x', 'y']"
        )

    def read(rows: Array | None) -> Tensor:
        chosen = frame[features] if rows is None else frame[features].iloc[rows]
        single = all(dtype in ("float32", "Float32") for dtype in map(str, chosen.dtypes))
        return as_tensor(chosen.to_numpy(dtype=np.float32 if single else np.float64, na_value=np.nan))

    return Table(title, len(frame), tuple(features), tuple(names), read, lambda name: objects(frame[name]))
