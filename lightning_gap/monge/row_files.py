"""Files of samples as a stream of blocks: read, mapped and written in constant memory, whatever their length."""

import gzip
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_gap.monge.files import open_table
from lightning_gap.monge.tables import Table, as_texts, first_line, library, there_is

__all__ = ["Block", "Output", "RowFile", "label_indices", "open_rows"]

Array = NDArray[Any]

_FRAMES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
_WRITTEN = (".npy", *_FRAMES, ".h5ad")
# Numbers of a block: 16 MiB in single precision.
_NUMBERS = 2**22
# Rows of a text file from which the kinds of its columns are told.
_FIRST_ROWS = 1000
_MISSING = ["", "nan", "NaN", "NA", "N/A", "null", "None"]


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a file.

    Attributes:
        start: Number of the first row.
        samples: ``(n, d)`` samples, all finite.
        labels: ``(n,)`` or ``(n, p)`` labels that were asked for, or ``None``.
        frame: The data frame that the samples are columns of, where there is one.
    """

    start: int
    samples: Tensor
    labels: Array | None
    frame: Any


@dataclass(frozen=True)
class RowFile:
    """A file of samples in rows.

    Attributes:
        title: How messages call it.
        path: The file.
        within: The array in an ``.h5ad`` file, as its path there; ``None`` for other files.
        length: Number of rows, where the file tells before it is read.
        features: Names of the columns of samples, where they have names.
        dim: Number of them.
        label_names: Names of what is beside the samples.
        blocks: Yields blocks, with the labels of some names.
    """

    title: str
    path: Path
    within: str | None
    length: int | None
    features: tuple[str, ...] | None
    dim: int
    label_names: tuple[str, ...]
    blocks: Callable[[Sequence[str]], Iterator[Block]]


def open_rows(argument: str, location: str, *, columns: Sequence[str] | None = None, least: int = 1) -> RowFile:
    """Open a file of samples without reading them.

    Args:
        argument: The caller's argument, for messages.
        location: Path to an ``.npy``, ``.npz``, ``.csv``, ``.tsv``, ``.parquet`` or ``.h5ad`` file; after ``::`` it
            names an array within an ``.npz`` or ``.h5ad`` file. All but ``.npz`` are read block by block.
        columns: Names of the features; by default all columns of numbers.
        least: Smallest number of rows in a block, but for the last one.

    Raises:
        FileNotFoundError: There is no such file.
        ModuleNotFoundError: The library that reads such files is not installed.
        TypeError: Samples are no real numbers.
        ValueError: The file is of another kind, or has no such array or column.
    """
    name, _, within = location.partition("::")
    if _suffix(name) in _FRAMES and not within and Path(name).expanduser().is_file():
        return _open_frames(argument, Path(name).expanduser(), columns, least)
    table = open_table(argument, location, columns=columns)
    first = table.read(np.arange(min(1, table.length)))
    if first.dim() != 2 or first.numel() == 0:
        table.samples(None)  # says what is wrong
    path = Path(name).expanduser()
    h5ad = (within or "X") if _suffix(name) == ".h5ad" else None

    def blocks(labels: Sequence[str]) -> Iterator[Block]:
        beside = _beside([table.labels(argument, label) for label in labels])
        rows = _rows(first.shape[1], least)
        for start in range(0, table.length, rows):
            numbers = np.arange(start, min(start + rows, table.length))
            # Opened anew: pages of a mapped file count as memory until it is closed.
            here = open_table(argument, location, columns=columns) if _suffix(name) == ".npy" else table
            samples = here.read(numbers)
            _check_finite(table, samples, start)
            yield Block(start, samples, None if beside is None else beside[numbers], None)

    return RowFile(table.title, path, h5ad, table.length, table.features, first.shape[1], table.label_names, blocks)


def _suffix(name: str) -> str | None:
    lower = name.lower()
    return next((s for s in (".npz", *_WRITTEN) if lower.endswith(s)), None)


def _rows(dim: int, least: int) -> int:
    """Return the rows of a block: a multiple of ``least``."""
    return max(1, _NUMBERS // dim // least) * least


def _beside(columns: Sequence[Array]) -> Array | None:
    return None if not columns else columns[0] if len(columns) == 1 else np.stack(columns, axis=1)


def _check_finite(table: Table, samples: Tensor, start: int) -> None:
    # One pass, and no copy, where all is well; two large numbers may overflow in it.
    if bool(samples.sum().isfinite()):
        return
    bad = (~samples.isfinite()).any(dim=1).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"{table.title} holds NaN or infinity in row {start + int(bad[0])}: remove or fill it; rows count from 0"
        )


# Tables


def _open_frames(argument: str, path: Path, columns: Sequence[str] | None, least: int) -> RowFile:
    title = f"{argument} ({path.name})"
    if path.stat().st_size == 0:
        raise ValueError(f"{argument}: the file {str(path)!r} is empty")
    names, features, length, frames = (_parquet if _suffix(path.name) == ".parquet" else _text)(title, path, columns)

    def blocks(labels: Sequence[str]) -> Iterator[Block]:
        for label in labels:
            if label not in names:
                raise ValueError(f"{title} has no column {label!r}; {there_is(names)}")
        start = 0
        for frame in frames(_rows(len(names), least)):
            table = open_table(title, frame, columns=features)
            samples = table.read(None)
            _check_finite(table, samples, start)
            yield Block(start, samples, _beside([frame[name].to_numpy(dtype=object) for name in labels]), frame)
            start += len(samples)
        if not start:
            raise ValueError(f"{title} has no rows")

    return RowFile(title, path, None, length, tuple(features), len(features), tuple(names), blocks)


Frames = tuple[list[str], list[str], int | None, Callable[[int], Iterator[Any]]]


def _parquet(title: str, path: Path, columns: Sequence[str] | None) -> Frames:
    pandas, parquet = library("pandas", title), library("pyarrow.parquet", title)
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:
        raise ValueError(f"{title}: cannot read {str(path)!r}: {first_line(error)}") from error
    names = list(file.schema_arrow.names)
    empty = file.schema_arrow.empty_table().to_pandas(types_mapper=pandas.ArrowDtype)
    features = _features(title, empty, names, columns)

    def frames(rows: int) -> Iterator[Any]:
        for batch in parquet.ParquetFile(path).iter_batches(rows):
            # Arrow's types: a column of integers with a gap in one block only would change its type there.
            yield batch.to_pandas(types_mapper=pandas.ArrowDtype)

    return names, features, file.metadata.num_rows, frames


def _text(title: str, path: Path, columns: Sequence[str] | None) -> Frames:
    pandas = library("pandas", title)
    separator = "\t" if ".tsv" in path.name.lower() else ","
    try:
        first = pandas.read_csv(path, sep=separator, nrows=_FIRST_ROWS)
    except Exception as error:
        raise ValueError(f"{title}: cannot read {str(path)!r}: {first_line(error)}") from error
    names = [str(name) for name in first.columns]
    features = _features(title, first, names, columns)
    texts = dict.fromkeys([name for name in names if name not in features], str)

    def frames(rows: int) -> Iterator[Any]:
        # What is no sample is text, and passes as it is: 007 is no 7.
        reading = pandas.read_csv(
            path, sep=separator, chunksize=rows, dtype=texts, keep_default_na=False,
            na_values=dict.fromkeys(features, _MISSING),
        )  # fmt: skip
        try:
            yield from reading
        except Exception as error:
            raise ValueError(f"{title}: cannot read {str(path)!r}: {first_line(error)}") from error

    return names, features, None, frames


def _features(title: str, frame: Any, names: Sequence[str], columns: Sequence[str] | None) -> list[str]:
    pandas = library("pandas", title)
    if columns is None:
        numeric = pandas.api.types.is_numeric_dtype
        features = [name for name in names if numeric(frame[name].dtype) and not name.startswith("Unnamed: ")]
        if not features:
            raise ValueError(f"{title} has no columns of numbers; {there_is(names)}")
        return features
    missing = [name for name in columns if name not in names]
    if missing:
        raise ValueError(f"columns: {title} has no column {missing[0]!r}; {there_is(names)}")
    return [str(name) for name in columns]


# Writing


class RowWriter(Protocol):
    """Writes images block by block."""

    def write(self, block: Block, images: Array) -> None:
        """Append the images of a block."""

    def close(self) -> None:
        """Complete the file."""


class Output:
    """A file that appears under its name only when it is complete.

    Args:
        argument: The caller's argument, for messages.
        location: The path.
        rows: What is mapped.
        overwrite: Whether a file of that name may be replaced.

    Raises:
        ValueError: The name has another ending, or cannot be written.
        FileExistsError: There is such a file.
    """

    def __init__(self, argument: str, location: str, rows: RowFile, *, overwrite: bool) -> None:
        self.path = Path(location).expanduser()
        suffix = _suffix(self.path.name)
        if suffix not in _WRITTEN or "::" in location:
            raise ValueError(
                f"{argument}: cannot write {location!r}: the name must end in one of {', '.join(_WRITTEN)}"
            )
        if suffix == ".h5ad" and rows.within is None:
            raise ValueError(
                f"{argument}: {self.path.name} is a copy of AnnData with the images in it, and {rows.title} is none: "
                "write an .npy, .csv or .parquet file"
            )
        if suffix in _FRAMES:
            library("pandas", argument)
            if suffix == ".parquet":
                library("pyarrow.parquet", argument)
        if self.path.is_dir():
            raise ValueError(f"{argument}: {str(self.path)!r} is a folder: name a file")
        if self.path.exists() and not overwrite:
            raise FileExistsError(f"{argument}: {str(self.path)!r} exists: choose another name, or give --overwrite")
        self.part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            self.part.touch()
        except OSError as error:
            raise ValueError(
                f"{argument}: cannot write {str(self.path)!r}: {error.strerror}; choose another folder"
            ) from error
        self._suffix = suffix
        self._rows = rows
        self._writer: RowWriter | None = None

    def write(self, block: Block, images: Array) -> None:
        """Append the images of a block."""
        if self._writer is None:
            self._writer = open_writer(self.part, str(self._suffix), self._rows, images)
        self._writer.write(block, images)

    def keep(self) -> None:
        """Complete the file and give it its name."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        os.replace(self.part, self.path)

    def discard(self) -> None:
        """Leave nothing behind."""
        if self._writer is not None:
            with suppress(Exception):
                self._writer.close()
        self.part.unlink(missing_ok=True)


def open_writer(path: Path, suffix: str, rows: RowFile, images: Array) -> RowWriter:
    """Return what writes a file of some kind.

    Args:
        path: The file.
        suffix: Its kind.
        rows: What is mapped.
        images: The first images, for their precision.
    """
    if suffix == ".npy":
        return _NpyWriter(path, images)
    if suffix == ".h5ad":
        return _AnndataWriter(path, rows, images)
    names = list(rows.features or [f"x{i}" for i in range(rows.dim)])
    return _ParquetWriter(path, names) if suffix == ".parquet" else _TextWriter(path, suffix, names)


class _NpyWriter:
    def __init__(self, path: Path, images: Array) -> None:
        self._file = path.open("wb")
        self._dtype, self._dim, self._length = images.dtype, images.shape[1], 0
        self._file.write(self._header())

    def _header(self) -> bytes:
        # Of one length whatever the shape: NumPy leaves room for a growing first axis.
        header = BytesIO()
        np.lib.format.write_array_header_1_0(
            header,
            {
                "descr": np.lib.format.dtype_to_descr(self._dtype),
                "fortran_order": False,
                "shape": (self._length, self._dim),
            },
        )
        return header.getvalue()

    def write(self, block: Block, images: Array) -> None:
        self._file.write(np.ascontiguousarray(images).data)
        self._length += len(images)

    def close(self) -> None:
        self._file.seek(0)
        self._file.write(self._header())
        self._file.close()


def _frame(block: Block, names: Sequence[str], images: Array) -> Any:
    pandas = library("pandas", "OUT")
    mapped = pandas.DataFrame(images, columns=list(names))
    if block.frame is None:
        return mapped
    frame = block.frame.reset_index(drop=True)
    return frame.assign(**{str(name): mapped[name] for name in names})


class _TextWriter:
    def __init__(self, path: Path, suffix: str, names: Sequence[str]) -> None:
        opened = gzip.open if suffix.endswith(".gz") else open
        self._file: Any = opened(path, "wt", encoding="utf-8", newline="")
        self._separator = "\t" if ".tsv" in suffix else ","
        self._names = names
        self._first = True

    def write(self, block: Block, images: Array) -> None:
        frame = _frame(block, self._names, images)
        frame.to_csv(self._file, sep=self._separator, index=False, header=self._first, lineterminator="\n")
        self._first = False

    def close(self) -> None:
        self._file.close()


class _ParquetWriter:
    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._path = path
        self._names = names
        self._writer: Any = None

    def write(self, block: Block, images: Array) -> None:
        arrow, parquet = library("pyarrow", "OUT"), library("pyarrow.parquet", "OUT")
        table = arrow.Table.from_pandas(_frame(block, self._names, images), preserve_index=False)
        if self._writer is None:
            self._writer = parquet.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table.cast(self._writer.schema))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _AnndataWriter:
    """A copy of the file, with the images in the array's place."""

    def __init__(self, path: Path, rows: RowFile, images: Array) -> None:
        h5py = library("h5py", rows.title)
        self._file = h5py.File(path, "w")
        place = str(rows.within)
        group, _, name = place.rpartition("/")
        with h5py.File(rows.path, "r") as given:
            self._file.attrs.update(given.attrs)
            for key in given:
                if group and key == group:
                    made = self._file.create_group(key)
                    made.attrs.update(given[key].attrs)
                    for other in given[key]:
                        if other != name:
                            given.copy(f"{key}/{other}", made)
                elif key != place:
                    given.copy(key, self._file)
        length, dim = rows.length, images.shape[1]
        self._array = self._file.create_dataset(place, (length, dim), dtype=images.dtype)
        self._array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})

    def write(self, block: Block, images: Array) -> None:
        self._array[block.start : block.start + len(images)] = images

    def close(self) -> None:
        self._file.close()


def label_indices(argument: str, labels: Array, names: Sequence[str]) -> Tensor:
    """Return the place of each label among some names.

    Args:
        argument: The caller's argument, for messages.
        labels: ``(n,)`` labels.
        names: The names.

    Returns:
        ``(n,)`` int64.

    Raises:
        ValueError: A label is no such name.
    """
    distinct, places = np.unique(as_texts(labels), return_inverse=True)
    known = {name: i for i, name in enumerate(names)}
    for name in distinct.tolist():
        if name not in known:
            raise ValueError(
                f"{argument}: the map has no condition {name!r}; its conditions are {', '.join(map(repr, names[:12]))}"
            )
    return torch.tensor([known[name] for name in distinct.tolist()])[torch.from_numpy(places)]
