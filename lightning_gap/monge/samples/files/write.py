"""Files of images, written block by block in constant memory."""

import gzip
import os
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lightning_gap.monge.samples.files.frames import FRAME_SUFFIXES, FrameFile, index_metadata
from lightning_gap.monge.samples.files.read import open_table
from lightning_gap.monge.samples.files.stream import Block, RowFile
from lightning_gap.monge.samples.files.table import library

__all__ = ["Output"]

Array = NDArray[Any]

_WRITTEN = (".npy", *FRAME_SUFFIXES, ".h5ad")


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
        suffix = next((s for s in _WRITTEN if self.path.name.lower().endswith(s)), None)
        if suffix not in _WRITTEN or "::" in location:
            raise ValueError(
                f"{argument}: cannot write {location!r}: the name must end in one of {', '.join(_WRITTEN)}"
            )
        if suffix == ".h5ad" and rows.within is None:
            raise ValueError(
                f"{argument}: {self.path.name} is a copy of AnnData with the images in it, and {rows.title} is none: "
                "write an .npy, .csv or .parquet file"
            )
        if suffix in FRAME_SUFFIXES:
            library("pandas", argument)
            if suffix in (".parquet", ".feather"):
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
    if suffix in (".parquet", ".feather"):
        return _ArrowWriter(path, suffix, names, rows.table)
    return _TextWriter(path, suffix, names, rows.table)


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
    def __init__(self, path: Path, suffix: str, names: Sequence[str], table: FrameFile | None) -> None:
        opened = gzip.open if suffix.endswith(".gz") else open
        self._file: Any = opened(path, "wt", encoding="utf-8", newline="")
        self._separator = "\t" if ".tsv" in suffix else ","
        self._names = names
        self._header: Any = True if table is None else list(table.header)

    def write(self, block: Block, images: Array) -> None:
        frame = _frame(block, self._names, images)
        frame.to_csv(self._file, sep=self._separator, index=False, header=self._header, lineterminator="\n")
        self._header = False

    def close(self) -> None:
        self._file.close()


class _ArrowWriter:
    def __init__(self, path: Path, suffix: str, names: Sequence[str], table: FrameFile | None) -> None:
        self._path = path
        self._suffix = suffix
        self._names = names
        self._table = table
        self._schema: Any = None
        self._writer: Any = None

    def write(self, block: Block, images: Array) -> None:
        arrow = library("pyarrow", "OUT")
        table = arrow.Table.from_pandas(_frame(block, self._names, images), preserve_index=False)
        if self._writer is None:
            self._schema = table.schema
            if self._table is not None:
                metadata = dict(table.schema.metadata or {})
                beside = index_metadata(self._table, metadata.get(b"pandas"))
                self._schema = table.schema.with_metadata({**metadata, b"pandas": beside} if beside else metadata)
            if self._suffix == ".parquet":
                self._writer = library("pyarrow.parquet", "OUT").ParquetWriter(self._path, self._schema)
            else:
                self._writer = library("pyarrow.ipc", "OUT").new_file(str(self._path), self._schema)
        self._writer.write_table(table.cast(self._schema))

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
        self._places, self._stored = rows.places, None
        width = images.shape[1]
        if rows.places is not None:
            # What is no feature of the map stays as it is, and all in the file's order.
            width = rows.width
            self._stored = open_table(rows.title, f"{rows.path}::{place}")
        self._array = self._file.create_dataset(place, (rows.length, width), dtype=images.dtype)
        self._array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})

    def write(self, block: Block, images: Array) -> None:
        rows = slice(block.start, block.start + len(images))
        if self._stored is not None:
            whole = self._stored.read(np.arange(rows.start, rows.stop)).numpy().astype(images.dtype)
            whole[:, self._places] = images
            images = whole
        self._array[rows] = images

    def close(self) -> None:
        self._file.close()
