"""``.csv`` and ``.tsv`` files, compressed or not."""

import gzip
from collections.abc import Collection, Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, cast

from numpy.typing import NDArray

from lightning_gap.monge.samples.files.frames import columns_of_row_names, frame_format, frame_with_images
from lightning_gap.monge.samples.files.table import FrameFile, Table, library, readable

__all__ = ["TEXT"]

# What counts as missing in a column of numbers: what pandas takes for it.
_MISSING = [
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
]  # fmt: skip


def _open(title: str, path: Path, *, first_rows: int = 1000) -> FrameFile:
    """Return a file, with the kinds of its columns as its first rows tell them."""
    pandas, separator = library("pandas", title), _separator(path.name)
    with readable(title, path):
        raw = pandas.read_csv(path, sep=separator, header=None, nrows=1, dtype=str, keep_default_na=False)
        header = [str(name) for name in raw.iloc[0]]
        # Where rows have more columns than names, pandas takes the first ones for an index.
        shape = pandas.read_csv(path, sep=separator, nrows=first_rows)
        header = [""] * (shape.index.nlevels if not isinstance(shape.index, pandas.RangeIndex) else 0) + header
        names = [name or f"Unnamed: {i}" for i, name in enumerate(header)]
        # Names in place of the header: a file of R has one name less than columns.
        options = {"filepath_or_buffer": path, "sep": separator, "names": names, "header": 0, "index_col": False}
        repeated = len(set(names)) < len(names)
        first = None if repeated else pandas.read_csv(**options, nrows=first_rows)

    def frames(rows: int | None, wanted: Collection[str], features: Collection[str]) -> Iterator[Any]:
        with readable(title, path):
            if rows is None:
                # One type for a column: read in parts, pandas may find numbers in one and text in another.
                chosen = [name for name in names if name in set(wanted)]
                yield pandas.read_csv(**options, usecols=chosen, low_memory=False)
                return
            # Text stays text: 007 is no 7.
            texts = {name: str for name in names if name not in set(features)}
            yield from pandas.read_csv(
                **options, chunksize=rows, dtype=texts, keep_default_na=False,
                na_values=dict.fromkeys(features, _MISSING),
            )  # fmt: skip

    row_names = tuple(columns_of_row_names(names))
    return FrameFile(tuple(names), row_names, tuple(header), None, first, frames)


def _separator(name: str) -> str:
    return "\t" if name.lower().removesuffix(".gz").endswith(".tsv") else ","


class _Writer:
    def __init__(self, path: Path, suffix: str, table: Table, images: NDArray[Any]) -> None:
        self._stored = path.open("wb")
        # Neither the time nor a name is in it: equal tables are equal files.
        zipped = gzip.GzipFile("", "wb", fileobj=self._stored, mtime=0) if suffix.endswith(".gz") else self._stored
        self._file = TextIOWrapper(cast(BinaryIO, zipped), encoding="utf-8", newline="")
        self._separator = _separator(suffix)
        self._names = list(table.features or [f"x{i}" for i in range(table.dim)])
        self._header: Any = list(table.origin.header) if isinstance(table.origin, FrameFile) else True

    def write(self, block: Table, images: NDArray[Any]) -> None:
        frame = frame_with_images(block, self._names, images)
        frame.to_csv(self._file, sep=self._separator, index=False, header=self._header, lineterminator="\n")
        self._header = False

    def close(self) -> None:
        self._file.close()
        self._stored.close()


TEXT = frame_format(_open, _Writer, ("pandas",))
