"""Files of samples as a stream of blocks, in constant memory, whatever their length."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_gap.monge.samples.features import feature_places, listed
from lightning_gap.monge.samples.files.frames import (
    FRAME_SUFFIXES,
    FrameFile,
    check_columns,
    feature_columns,
    frame_table,
    open_frame_file,
)
from lightning_gap.monge.samples.files.read import open_table, resolve_file
from lightning_gap.monge.samples.files.table import Table, there_is

__all__ = ["Block", "RowFile", "open_rows"]

Array = NDArray[Any]

# Numbers of a block: 16 MiB in single precision.
_NUMBERS = 2**22


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
        table: The file, where it is one of a table.
        places: Where the features stand among the columns of an ``.h5ad`` file's array; ``None`` where they are all of
            them, in order.
        width: Number of those columns.
    """

    title: str
    path: Path
    within: str | None
    length: int | None
    features: tuple[str, ...] | None
    dim: int
    label_names: tuple[str, ...]
    blocks: Callable[[Sequence[str]], Iterator[Block]]
    table: FrameFile | None = None
    places: Array | None = None
    width: int = 0


def open_rows(
    argument: str,
    location: str,
    *,
    columns: Sequence[str] | None = None,
    wanted: Sequence[str] | None = None,
    labels: Sequence[str] = (),
    least: int = 1,
) -> RowFile:
    """Open a file of samples without reading them.

    Args:
        argument: The caller's argument, for messages.
        location: Path to an ``.npy``, ``.npz``, ``.csv``, ``.tsv``, ``.parquet``, ``.feather`` or ``.h5ad`` file; after
            ``::`` it names an array within an ``.npz`` or ``.h5ad`` file. All but ``.npz`` are read block by block.
        columns: Names of the features; by default all columns of numbers that are no labels. Where none of them is
            wanted they stand for the wanted ones, by place.
        wanted: Names of the map's features, in its order, where it knows them; columns are matched to them by name.
        labels: Columns that are used as labels, hence are no features.
        least: Smallest number of rows in a block, but for the last one.

    Raises:
        FileNotFoundError: There is no such file.
        ModuleNotFoundError: The library that reads such files is not installed.
        TypeError: Samples are no real numbers.
        ValueError: The file is of another kind, has no such array or column, or lacks a wanted feature.
    """
    path, suffix, within = resolve_file(argument, location)
    if suffix in FRAME_SUFFIXES and within is None:
        return _open_frames(argument, path, suffix, columns, wanted, labels, least)
    whole = open_table(argument, location, columns=columns)
    places = None
    if whole.features is not None:
        places = _matched(whole.title, whole.features, columns, wanted)
    chosen = columns if places is None or wanted is None else wanted
    table = whole if chosen is columns else open_table(argument, location, columns=chosen)
    first = table.read(np.arange(min(1, table.length)))
    if first.dim() != 2 or first.numel() == 0:
        table.samples(None)  # says what is wrong

    def blocks(labels: Sequence[str]) -> Iterator[Block]:
        beside = _beside([table.labels(argument, label) for label in labels])
        rows = _rows(first.shape[1], least)
        for start in range(0, table.length, rows):
            numbers = np.arange(start, min(start + rows, table.length))
            # Opened anew: pages of a mapped file count as memory until it is closed.
            here = open_table(argument, location, columns=columns) if suffix == ".npy" else table
            samples = here.read(numbers)
            _check_finite(table, samples, start)
            yield Block(start, samples, None if beside is None else beside[numbers], None)

    h5ad = (within or "X") if suffix == ".h5ad" else None
    width = 0
    if h5ad is not None:
        stored = open_table(argument, location)
        width = len(stored.features) if stored.features is not None else first.shape[1]
        if table.features is not None and stored.features is not None and table.features != stored.features:
            place = {name: i for i, name in enumerate(stored.features)}
            places = np.array([place[name] for name in table.features])
        else:
            places = None
    return RowFile(table.title, path, h5ad, table.length, table.features, first.shape[1], table.label_names, blocks,
                   places=places, width=width)  # fmt: skip


def _matched(
    title: str, given: Sequence[str], columns: Sequence[str] | None, wanted: Sequence[str] | None
) -> Array | None:
    """Return where the wanted features stand among those that were found, or named by hand."""
    if wanted is None or (columns is not None and not set(columns) & set(wanted)):
        return None
    by_hand = f"rename the columns, or name those that stand for {listed(wanted)}, in this order, by --columns"
    return feature_places(title, given, wanted, "the map", remedy=by_hand)


def _rows(dim: int, least: int) -> int:
    """Return the rows of a block: a multiple of ``least``."""
    return max(1, _NUMBERS // dim // least) * least


def _beside(columns: Sequence[Array]) -> Array | None:
    return None if not columns else columns[0] if len(columns) == 1 else np.stack(columns, axis=1)


def _check_finite(table: Table, samples: Tensor, start: int) -> None:
    # One pass, and no copy, where all is well; two large numbers may overflow in it.
    if bool(samples.sum().isfinite()):
        return
    bad = (~samples.isfinite()).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        where = f" of {table.features[column]!r}" if table.features is not None else ""
        raise ValueError(
            f"{table.title} holds NaN or infinity in row {start + row}{where}: remove or fill it; rows count from 0"
        )


# Tables


def _open_frames(
    argument: str,
    path: Path,
    suffix: str,
    columns: Sequence[str] | None,
    wanted: Sequence[str] | None,
    labels: Sequence[str],
    least: int,
) -> RowFile:
    title = f"{argument} ({path.name})"
    file = open_frame_file(title, path, suffix)
    names = list(file.names)
    check_columns(title, columns, names)
    if columns is None and wanted is not None and set(wanted) <= set(names):
        # Whatever else there is passes as it is; what might be taken for a feature is said.
        others = file.first.drop(columns=list(wanted))
        numbers = [name for name in others.columns if others[name].dtype.kind in "fiu"]
        given = [name for name in names if name in set(wanted) or name in set(numbers) - {*labels, *file.row_names}]
    else:
        given = feature_columns(
            title, file.first, columns, frozenset(labels), file.row_names, texts_pass=columns is None
        )
    features = given if _matched(title, given, columns, wanted) is None else list(wanted or ())
    feature_columns(title, file.first, features, frozenset())

    def blocks(labels: Sequence[str]) -> Iterator[Block]:
        for label in labels:
            if label not in names:
                raise ValueError(f"{title} has no column {label!r}; {there_is(names)}")
        start = 0
        for frame in file.blocks(_rows(len(names), least), features):
            table = frame_table(title, frame, features, frozenset(), start=start)
            samples = table.read(None)
            _check_finite(table, samples, start)
            yield Block(start, samples, _beside([table.label(name) for name in labels]), frame)
            start += len(samples)
        if not start:
            raise ValueError(f"{title} has no rows")

    return RowFile(title, path, None, file.length, tuple(features), len(features), tuple(names), blocks, table=file)
