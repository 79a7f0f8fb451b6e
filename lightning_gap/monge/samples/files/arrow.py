"""``.parquet`` and ``.feather`` files."""

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from lightning_gap.monge.samples.files.frames import columns_of_row_names, frame_format, frame_with_images
from lightning_gap.monge.samples.files.table import FrameFile, Table, library, readable

__all__ = ["FEATHER", "PARQUET"]


def _open_parquet(title: str, path: Path) -> FrameFile:
    open_file = library("pyarrow.parquet", title).ParquetFile
    with readable(title, path):
        file = open_file(path)

    def batches(rows: int | None, wanted: list[str]) -> Iterator[Any]:
        yield from [open_file(path).read(columns=wanted)] if rows is None else open_file(path).iter_batches(rows)

    return _frame_file(title, path, file.schema_arrow, file.metadata.num_rows, batches)


def _open_feather(title: str, path: Path) -> FrameFile:
    arrow, ipc = library("pyarrow", title), library("pyarrow.ipc", title)

    def open_file() -> Any:
        return ipc.open_file(arrow.memory_map(str(path)))

    with readable(title, path):
        file = open_file()
        length = sum(len(file.get_batch(i)) for i in range(file.num_record_batches))

    def batches(rows: int | None, wanted: list[str]) -> Iterator[Any]:
        file = open_file()
        if rows is None:
            yield file.read_all().select(wanted)
            return
        for i in range(file.num_record_batches):
            batch = file.get_batch(i)
            yield from (batch.slice(start, rows) for start in range(0, len(batch), rows))

    return _frame_file(title, path, file.schema, length, batches)


def _frame_file(
    title: str, path: Path, schema: Any, length: int, batches: Callable[[int | None, list[str]], Iterator[Any]]
) -> FrameFile:
    names, metadata = tuple(schema.names), schema.pandas_metadata
    row_names = [name for name in (metadata or {}).get("index_columns", ()) if isinstance(name, str)]
    row_names += [name for name in columns_of_row_names(names) if name not in row_names]

    def frames(rows: int | None, wanted: Collection[str], features: Collection[str]) -> Iterator[Any]:
        with readable(title, path):
            for batch in batches(rows, [name for name in names if name in set(wanted)]):
                yield _to_pandas(title, batch)

    first = _to_pandas(title, schema.empty_table()) if len(set(names)) == len(names) else None
    return FrameFile(names, tuple(row_names), names, length, first, frames, metadata)


def _to_pandas(title: str, table: Any) -> Any:
    # Arrow's types: a column of integers with a gap in one block only would change its type there. And all columns as
    # they stand: one that pandas has for an index is a column too.
    return table.to_pandas(types_mapper=library("pandas", title).ArrowDtype, ignore_metadata=True)


class _Writer:
    def __init__(self, path: Path, suffix: str, table: Table, images: NDArray[Any]) -> None:
        self._path = path
        self._suffix = suffix
        self._names = list(table.features or [f"x{i}" for i in range(table.dim)])
        self._metadata = table.origin.metadata if isinstance(table.origin, FrameFile) else None
        self._schema: Any = None
        self._writer: Any = None

    def write(self, block: Table, images: NDArray[Any]) -> None:
        frame = frame_with_images(block, self._names, images)
        table = library("pyarrow", "OUT").Table.from_pandas(frame, preserve_index=False)
        if self._writer is None:
            written = dict(table.schema.metadata or {})
            if self._metadata is not None and b"pandas" in written:
                written[b"pandas"] = _with_index(json.loads(written[b"pandas"]), self._metadata)
            self._schema = table.schema.with_metadata(written)
            if self._suffix == ".parquet":
                self._writer = library("pyarrow.parquet", "OUT").ParquetWriter(self._path, self._schema)
            else:
                self._writer = library("pyarrow.ipc", "OUT").new_file(str(self._path), self._schema)
        self._writer.write_table(table.cast(self._schema))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _with_index(written: dict[str, Any], given: dict[str, Any]) -> bytes:
    """Return what pandas reads beside a table, with the index of the file that it is a copy of."""
    index = [name for name in given.get("index_columns", ()) if isinstance(name, str)]
    described = {column.get("field_name"): column for column in given.get("columns", ())}
    written["index_columns"] = given.get("index_columns", [])
    written["columns"] = [
        described.get(column["field_name"], column) if column["field_name"] in index else column
        for column in written["columns"]
    ]
    return json.dumps(written).encode()


PARQUET = frame_format(_open_parquet, _Writer, ("pandas", "pyarrow.parquet"))
FEATHER = frame_format(_open_feather, _Writer, ("pandas", "pyarrow.parquet"))
