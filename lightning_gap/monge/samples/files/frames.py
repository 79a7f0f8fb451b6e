"""Tables of data frames, and of the files that hold one: which columns are samples, and how they are read."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_gap.monge.samples.files.table import Table, as_tensor, first_line, library, objects, there_is

__all__ = ["FRAME_SUFFIXES", "FrameFile", "check_columns", "feature_columns", "frame_table", "open_frame_file"]

Array = NDArray[Any]
Kind = Literal["numbers", "text", "mixed"]

FRAME_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet", ".feather")
_ARROW = (".parquet", ".feather")
# Rows of a text file from which the kinds of its columns are told, where it is read in blocks.
_FIRST_ROWS = 1000
# What pandas, R and arrow call a column without a name, which holds the names of rows.
_ROW_NAMES = re.compile(r"Unnamed: \d+|__index_level_\d+__")
# What counts as missing in a column of numbers: what pandas takes for it.
_MISSING = [
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
]  # fmt: skip


@dataclass(frozen=True)
class FrameFile:
    """A file of a table, of which the columns are known and the rows are read when they are asked for.

    Attributes:
        title: How messages call it.
        path: The file.
        suffix: Its kind.
        names: Names of all columns, those of row names among them.
        row_names: Names of the columns that hold names of rows, which are no features.
        header: Names as the file has them: none for an unnamed column.
        length: Number of rows, where the file tells before it is read.
        first: The first rows, or none of a file that tells the types of its columns.
        metadata: What pandas has written of the table beside it.
    """

    title: str
    path: Path
    suffix: str
    names: tuple[str, ...]
    row_names: tuple[str, ...]
    header: tuple[str, ...]
    length: int | None
    first: Any
    metadata: dict[str, Any] | None = None

    def read(self, names: Sequence[str] | None = None) -> Any:
        """Return a data frame of some columns, by default all, in the file's order."""
        wanted = list(self.names) if names is None else [name for name in self.names if name in set(names)]
        pandas = library("pandas", self.title)
        try:
            if self.suffix == ".parquet":
                return _to_pandas(self.title, _parquet(self.title, self.path).read(columns=wanted))
            if self.suffix == ".feather":
                return _to_pandas(self.title, _feather(self.title, self.path).read_all().select(wanted))
            # One type for a column: read in parts, pandas may find numbers in one and text in another.
            return pandas.read_csv(**self._text_options(), usecols=wanted, low_memory=False)
        except ModuleNotFoundError:
            raise
        except Exception as error:
            raise self._unreadable(error) from error

    def blocks(self, rows: int, features: Sequence[str]) -> Iterator[Any]:
        """Yield data frames of at most so many rows, all columns in each; what is no feature passes as it is."""
        try:
            if self.suffix in _ARROW:
                for batch in self._batches(rows):
                    yield _to_pandas(self.title, batch)
                return
            # Text stays text: 007 is no 7.
            texts = {name: str for name in self.names if name not in set(features)}
            pandas = library("pandas", self.title)
            yield from pandas.read_csv(
                **self._text_options(), chunksize=rows, dtype=texts, keep_default_na=False,
                na_values=dict.fromkeys(features, _MISSING),
            )  # fmt: skip
        except ModuleNotFoundError:
            raise
        except Exception as error:
            raise self._unreadable(error) from error

    def _batches(self, rows: int) -> Iterator[Any]:
        if self.suffix == ".parquet":
            yield from _parquet(self.title, self.path).iter_batches(rows)
            return
        file = _feather(self.title, self.path)
        for i in range(file.num_record_batches):
            batch = file.get_batch(i)
            yield from (batch.slice(start, rows) for start in range(0, len(batch), rows))

    def _text_options(self) -> dict[str, Any]:
        # Names in place of the header: a file of R has one name less than columns.
        return {
            "filepath_or_buffer": self.path, "sep": _separator(self.suffix), "names": list(self.names), "header": 0,
            "index_col": False,
        }  # fmt: skip

    def _unreadable(self, error: Exception) -> ValueError:
        return ValueError(f"{self.title}: cannot read {str(self.path)!r}: {first_line(error)}")


def open_frame_file(title: str, path: Path, suffix: str) -> FrameFile:
    """Return a file of a table, with its columns.

    Args:
        title: How messages call it.
        path: The file.
        suffix: Its kind, one of ``FRAME_SUFFIXES``.

    Raises:
        ModuleNotFoundError: The library that reads such files is missing.
        ValueError: It cannot be read, or two columns have one name.
    """
    library("pandas", title)
    try:
        file = _arrow_file(title, path, suffix) if suffix in _ARROW else _text_file(title, path, suffix)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{title}: cannot read {str(path)!r}: {first_line(error)}") from error
    _refuse_repeated(title, [name for name in file.header if name])
    if file.length == 0 or (file.length is None and not len(file.first)):
        raise ValueError(f"{title} has no rows")
    return file


def _arrow_file(title: str, path: Path, suffix: str) -> FrameFile:
    if suffix == ".parquet":
        parquet = _parquet(title, path)
        schema, length = parquet.schema_arrow, parquet.metadata.num_rows
    else:
        file = _feather(title, path)
        schema, length = file.schema, sum(len(file.get_batch(i)) for i in range(file.num_record_batches))
    metadata = schema.pandas_metadata
    row_names = [name for name in (metadata or {}).get("index_columns", ()) if isinstance(name, str)]
    names = tuple(schema.names)
    row_names += [name for name in names if _ROW_NAMES.fullmatch(name) and name not in row_names]
    first = _to_pandas(title, schema.empty_table()) if len(set(names)) == len(names) else None
    return FrameFile(title, path, suffix, names, tuple(row_names), names, length, first, metadata)


def _text_file(title: str, path: Path, suffix: str) -> FrameFile:
    pandas, separator = library("pandas", title), _separator(suffix)
    raw = pandas.read_csv(path, sep=separator, header=None, nrows=1, dtype=str, keep_default_na=False)
    header = [str(name) for name in raw.iloc[0]]
    # Where rows have more columns than names, pandas takes the first ones for an index.
    shape = pandas.read_csv(path, sep=separator, nrows=_FIRST_ROWS)
    header = [""] * (shape.index.nlevels if not isinstance(shape.index, pandas.RangeIndex) else 0) + header
    names = tuple(name or f"Unnamed: {i}" for i, name in enumerate(header))
    row_names = tuple(name for name in names if _ROW_NAMES.fullmatch(name))
    file = FrameFile(title, path, suffix, names, row_names, tuple(header), None, None)
    if len(set(names)) < len(names):
        return file
    first = pandas.read_csv(**file._text_options(), nrows=_FIRST_ROWS)
    return FrameFile(title, path, suffix, names, row_names, tuple(header), None, first)


def _separator(suffix: str) -> str:
    return "\t" if suffix.startswith(".tsv") else ","


def _parquet(title: str, path: Path) -> Any:
    return library("pyarrow.parquet", title).ParquetFile(path)


def _feather(title: str, path: Path) -> Any:
    arrow, ipc = library("pyarrow", title), library("pyarrow.ipc", title)
    return ipc.open_file(arrow.memory_map(str(path)))


def _to_pandas(title: str, table: Any) -> Any:
    # Arrow's types: a column of integers with a gap in one block only would change its type there. And all columns as
    # they stand: one that pandas has for an index is a column too.
    return table.to_pandas(types_mapper=library("pandas", title).ArrowDtype, ignore_metadata=True)


def index_metadata(file: FrameFile, written: bytes | None) -> bytes | None:
    """Return what pandas reads beside a table, with the index of the file that it is a copy of.

    Args:
        file: The file that was read.
        written: What arrow would write for the copy.
    """
    if file.metadata is None or written is None:
        return written
    found = json.loads(written)
    index = [name for name in file.metadata.get("index_columns", ()) if isinstance(name, str)]
    given = {column.get("field_name"): column for column in file.metadata.get("columns", ())}
    found["index_columns"] = file.metadata.get("index_columns", [])
    found["columns"] = [
        given.get(column["field_name"], column) if column["field_name"] in index else column
        for column in found["columns"]
    ]
    return json.dumps(found).encode()


# --- which columns are samples ------------------------------------------------------------------------------------


def check_columns(title: str, columns: Sequence[str] | None, names: Sequence[str]) -> None:
    """Refuse columns that a table does not have.

    Args:
        title: How messages call the table.
        columns: The columns that were named, or ``None``.
        names: Those that it has.

    Raises:
        ValueError: One is not there, or is named twice.
    """
    for name in columns or ():
        if name not in names:
            raise ValueError(f"columns: {title} has no column {name!r}; {there_is(names)}")
    if columns is not None and len(set(columns)) < len(columns):
        twice = next(name for i, name in enumerate(columns) if name in columns[:i])
        raise ValueError(f"columns names {twice!r} twice: name each once")


def feature_columns(
    title: str,
    frame: Any,
    columns: Sequence[str] | None,
    labels: frozenset[str],
    row_names: Sequence[str] = (),
    *,
    texts_pass: bool = False,
) -> list[str]:
    """Return which columns hold samples: those that are named, or all but labels and names of rows.

    Args:
        title: How messages call the table.
        frame: The table, or its first rows, with names that are text.
        columns: Names of the features, in this order.
        labels: Names of labels.
        row_names: Names of columns that hold names of rows.
        texts_pass: Whether columns of text are passed over rather than refused.

    Raises:
        TypeError: Columns hold no numbers.
        ValueError: There are none, there is no such column, or one of numbers holds something else.
    """
    names = list(frame.columns)
    if columns is None:
        chosen = [
            name for name in names if name not in labels and name not in row_names and not _ROW_NAMES.fullmatch(name)
        ]
    else:
        chosen = [str(name) for name in columns]
        check_columns(title, chosen, names)
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


def frame_table(
    title: str,
    frame: Any,
    columns: Sequence[str] | None,
    labels: frozenset[str],
    row_names: Sequence[str] = (),
    *,
    start: int = 0,
) -> Table:
    """Return the table of a data frame.

    Args:
        title: How messages call it.
        frame: The data frame.
        columns: Names of the features, in this order; by default all that are no labels.
        labels: Names of labels.
        row_names: Names of columns that hold names of rows.
        start: Number of the first row, for messages.
    """
    names = [str(name) for name in frame.columns]
    _refuse_repeated(title, names)
    frame = frame.set_axis(names, axis=1)
    if columns is not None and start:
        # A later block of a file, of which the kinds are known.
        features = list(columns)
    else:
        features = feature_columns(title, frame, columns, labels, row_names)
    samples = _as_numbers(title, frame[features], start)

    def read(rows: Array | None) -> Any:
        chosen = samples if rows is None else samples.iloc[rows]
        single = all(str(dtype) in ("float32", "Float32", "float[pyarrow]") for dtype in chosen.dtypes)
        return as_tensor(chosen.to_numpy(dtype=np.float32 if single else np.float64, na_value=np.nan))

    return Table(title, len(frame), tuple(features), tuple(names), read, lambda name: objects(frame[name]))


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
