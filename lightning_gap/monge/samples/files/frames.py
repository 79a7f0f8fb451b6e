"""Data frames, in memory and in files of one: which columns are samples, and how they are read."""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_gap.monge.samples.files.table import (
    Format,
    FrameFile,
    NoRowsError,
    Reading,
    RowWriter,
    Table,
    as_tensor,
    library,
    objects,
    there_is,
)

__all__ = ["columns_of_row_names", "frame_format", "frame_table", "frame_with_images"]

Array = NDArray[Any]
Kind = Literal["numbers", "text", "mixed"]

# What pandas, R and arrow call a column without a name, which holds the names of rows.
_ROW_NAMES = re.compile(r"Unnamed: \d+|__index_level_\d+__")


def frame_format(
    open_file: Callable[[str, Path], FrameFile],
    writer: Callable[[Path, str, Table, Array], RowWriter],
    libraries: tuple[str, ...],
) -> Format:
    """Return a format of files of data frames, of what opens and what writes one, and the modules that it needs."""
    opened = partial(_open_checked, open_file)
    return Format(
        lambda title, path, within, reading: _file_table(title, opened(title, path), reading),
        writer, opened, libraries,
    )  # fmt: skip


def _open_checked(open_file: Callable[[str, Path], FrameFile], title: str, path: Path) -> FrameFile:
    library("pandas", title)
    file = open_file(title, path)
    _refuse_repeated(title, [name for name in file.header if name])
    if file.length == 0 or (file.length is None and not len(file.first)):
        raise NoRowsError(f"{title} has no rows")
    return file


def _file_table(title: str, file: FrameFile, reading: Reading) -> Table:
    """Return the table of a file, whose features are told by its first rows."""
    _check_columns(title, reading.columns, file.names)
    columns, labels, wanted = reading.columns, reading.labels, set(reading.wanted or ())
    if columns is None and wanted and wanted <= set(file.names):
        # Whatever else there is passes as it is; what might be taken for a feature is said.
        others = file.first.drop(columns=list(wanted))
        numbers = {name for name in others.columns if others[name].dtype.kind in "fiu"}
        also = wanted | (numbers - {*labels, *file.row_names})
        found = [name for name in file.names if name in also]
    else:
        found = _feature_columns(title, file.first, columns, labels, file.row_names, texts_pass=reading.texts_pass)
    features = reading.matched(title, found)
    _feature_columns(title, file.first, features)

    def stream(rows: int | None) -> Iterator[Table]:
        start = 0
        read = [*features, *(name for name in labels if name in file.names)]
        names = file.names if rows is not None or columns is None else read
        for frame in file.frames(rows, names, features):
            yield frame_table(title, frame, Reading(features), start=None if rows is None else start)
            start += len(frame)
        if not start:
            raise NoRowsError(f"{title} has no rows")

    def whole(_: object) -> Any:
        raise NotImplementedError("a file that is read in order has rows in its blocks: ask whole() for them")

    return Table(
        title, file.length, len(features), tuple(features), file.names, whole, whole, stream=stream, origin=file
    )


def frame_table(title: str, frame: Any, reading: Reading, *, start: int | None = None) -> Table:
    """Return the table of a data frame, of which ``start`` is the number of the first row in its file."""
    names = [str(name) for name in frame.columns]
    _refuse_repeated(title, names)
    named = frame.set_axis(names, axis=1)
    # The kinds of a file's columns are known after its first block.
    features = list(reading.columns or ()) if start else _feature_columns(title, named, reading.columns, reading.labels)
    samples = _as_numbers(title, named[features], start or 0)

    def read(rows: Array | None) -> Any:
        chosen = samples if rows is None else samples.iloc[rows]
        single = all(str(dtype) in ("float32", "Float32", "float[pyarrow]") for dtype in chosen.dtypes)
        return as_tensor(chosen.to_numpy(dtype=np.float32 if single else np.float64, na_value=np.nan))

    return Table(
        title, len(named), len(features), tuple(features), tuple(names), read, lambda name: objects(named[name]),
        start=start, frame=frame,
    )  # fmt: skip


def frame_with_images(block: Table, features: Sequence[str], images: Array) -> Any:
    """Return the data frame of a block with images in place of the features, or one of images alone."""
    mapped = library("pandas", "OUT").DataFrame(images, columns=list(features))
    if block.frame is None:
        return mapped
    return block.frame.reset_index(drop=True).assign(**{name: mapped[name] for name in features})


def columns_of_row_names(names: Sequence[str]) -> list[str]:
    """Return the names of columns that had none, and so hold names of rows."""
    return [name for name in names if _ROW_NAMES.fullmatch(name)]


def _check_columns(title: str, columns: Sequence[str] | None, names: Collection[str]) -> None:
    """Refuse columns that a table does not have, or that are named twice."""
    for name in columns or ():
        if str(name) not in names:
            raise ValueError(f"columns: {title} has no column {name!r}; {there_is(names)}")
    if columns is not None and len(set(columns)) < len(columns):
        twice = next(name for i, name in enumerate(columns) if name in columns[:i])
        raise ValueError(f"columns names {twice!r} twice: name each once")


def _feature_columns(
    title: str,
    frame: Any,
    columns: Sequence[str] | None,
    labels: Collection[str] = (),
    row_names: Collection[str] = (),
    *,
    texts_pass: bool = False,
) -> list[str]:
    """Return which columns hold samples: those that are named, or all but labels and names of rows."""
    names = list(frame.columns)
    if columns is None:
        others = {*labels, *row_names, *columns_of_row_names(names)}
        chosen = [name for name in names if name not in others]
    else:
        chosen = [str(name) for name in columns]
        _check_columns(title, chosen, names)
    kinds = {name: _kind(title, frame[name]) for name in chosen}
    for name in chosen:
        if kinds[name] == "mixed":
            _refuse_text(title, frame[name], name, 0)
    texts = [name for name in chosen if kinds[name] == "text"]
    if texts_pass and columns is None:
        chosen, texts = [name for name in chosen if name not in texts], []
    if not chosen:
        raise ValueError(f"{title} has no columns of {'numbers' if texts_pass else 'samples'}; {there_is(names)}")
    if texts:
        listed = ", ".join(map(repr, texts[:5])) + (", ..." if len(texts) > 5 else "")
        raise TypeError(
            f"{title}: the columns {listed} hold no numbers: name those of the samples, as in columns=['x', 'y']"
        )
    return chosen


def _refuse_repeated(title: str, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{title} has two columns {twice!r}: rename one")


def _is_number(title: str, dtype: Any) -> bool:
    types = library("pandas", title).api.types
    # Arrow's booleans are no numbers to pandas, and its own are.
    return bool(types.is_numeric_dtype(dtype) or getattr(dtype, "kind", "") == "b")


def _kind(title: str, column: Any) -> Kind:
    pandas = library("pandas", title)
    if _is_number(title, column.dtype):
        return "numbers"
    if column.dtype != object and not pandas.api.types.is_string_dtype(column.dtype):
        return "text"  # dates, categories, lists
    there = column[column.notna()]
    if not len(there):
        return "numbers" if len(column) else "text"
    numbers = pandas.to_numeric(there, errors="coerce").notna()
    if numbers.all():
        # Digits that somebody keeps as text are names.
        return "text" if any(isinstance(value, str) for value in there) else "numbers"
    return "mixed" if numbers.mean() >= 0.5 else "text"


def _as_numbers(title: str, samples: Any, start: int) -> Any:
    """Return the columns as numbers."""
    pandas = library("pandas", title)
    others = [name for name in samples.columns if not _is_number(title, samples[name].dtype)]
    for name in others:
        _refuse_text(title, samples[name], name, start)
    return samples.assign(**{name: pandas.to_numeric(samples[name]) for name in others}) if others else samples


def _refuse_text(title: str, column: Any, name: str, start: int) -> None:
    """Raise for the first value of a column of numbers that is none."""
    pandas = library("pandas", title)
    bad = (column.notna() & pandas.to_numeric(column, errors="coerce").isna()).to_numpy(dtype=bool).nonzero()[0]
    if len(bad):
        value = column.iloc[int(bad[0])]
        raise ValueError(
            f"{title} holds {value!r} in row {start + int(bad[0])} of the column {name!r}, which is no number: correct "
            "it, or name the columns of the samples by columns=; rows count from 0"
        )
