"""Samples in rows, with labels beside them, whatever they are read from: whole, or in blocks."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_gap import extras
from lightning_gap.monge.samples.features import feature_places, listed

__all__ = [
    "Format",
    "FrameFile",
    "NoRowsError",
    "Reading",
    "RowWriter",
    "Table",
    "as_tensor",
    "as_texts",
    "library",
    "objects",
    "readable",
    "refuse_not_finite",
    "there_is",
    "titled",
]

Array = NDArray[Any]


class NoRowsError(ValueError):
    """A table is whole, and has no rows."""


@dataclass(frozen=True)
class Reading:
    """Which columns of a table are samples."""

    # Their names, in order; all that are no labels by default. If none is wanted they stand for the wanted ones.
    columns: Sequence[str] | None = None
    layer: str | None = None  # of AnnData; X by default
    obsm: str | None = None  # embedding of AnnData, in place of a layer
    labels: Collection[str] = ()  # used as labels, hence no features
    wanted: Sequence[str] | None = None  # a map's features, in its order: columns are matched to them by name
    texts_pass: bool = False  # columns of text are passed over rather than refused

    def __post_init__(self) -> None:
        if self.layer is not None and self.obsm is not None:
            raise ValueError(f"layer={self.layer!r} and obsm={self.obsm!r} exclude each other: give one")
        if isinstance(self.columns, str):
            raise TypeError(f"columns must be a list of names, got {self.columns!r}: write columns=[{self.columns!r}]")

    def matched(self, title: str, found: Sequence[str]) -> list[str]:
        """Return the features that were found, or named by hand; in the map's order where it names the same ones."""
        if self.wanted is None or (self.columns is not None and not set(self.columns) & set(self.wanted)):
            return list(found)
        by_hand = f"rename the columns, or name those that stand for {listed(self.wanted)}, in this order, by --columns"
        places = feature_places(title, found, self.wanted, "the map", remedy=by_hand)
        return list(found if places is None else self.wanted)


@dataclass(frozen=True)
class Table:
    """Samples in rows, and labels of the rows. Samples are read when they are asked for."""

    title: str  # how messages call it: the argument, and the file
    length: int | None  # rows; None where a file does not tell before it is read
    dim: int  # columns of samples; 0 where there is no matrix
    features: tuple[str, ...] | None
    label_names: tuple[str, ...]  # of the labels beside the rows
    read: Callable[[Array | None], Tensor]  # samples of some rows, in increasing order, or of all
    label: Callable[[str], Array]  # of a name, one a row
    start: int | None = None  # the first row's number in a larger table; None where this is all
    frame: Any = None  # the data frame that the samples are columns of
    # Yields tables of so many rows, or of all where None: how a file is read that is read in order.
    stream: Callable[[int | None], Iterator["Table"]] | None = None
    origin: Any = None  # what its file keeps of it beside rows, for who writes a copy
    layers: tuple[str, ...] | None = None  # others of the AnnData whose genes the samples are

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError(f"{self.title} does not tell its length before it is read")
        return self.length

    def whole(self) -> "Table":
        """Return the table with any row at hand: a file that is read in order, as one block."""
        return self if self.stream is None else next(self.stream(None))

    def blocks(self, rows: int) -> Iterator["Table"]:
        """Yield consecutive rows, so many at once, as tables."""
        if self.stream is not None:
            yield from self.stream(rows)
            return
        label = cache(self.label)
        for start in range(0, len(self), rows):
            yield self._slice(np.arange(start, min(start + rows, len(self))), label)

    def _slice(self, numbers: Array, label: Callable[[str], Array]) -> "Table":
        return replace(
            self, length=len(numbers), start=int(numbers[0]),
            read=lambda rows: self.read(numbers if rows is None else numbers[rows]),
            label=lambda name: label(name)[numbers],
        )  # fmt: skip

    def labels(self, argument: str, name: str) -> Array:
        """Return the labels called ``name``, which ``argument`` asks for."""
        if name not in self.label_names:
            raise ValueError(f"{argument}: {self.title} has no {name!r}; {there_is(self.label_names)}")
        return self.label(name)

    def rows(self, argument: str, wanted: Mapping[str, Any] | None) -> Array | None:
        """Return the rows whose labels are among the wanted ones, ``{name: value or values}``; ``None`` for all."""
        if wanted is None:
            return None
        if not isinstance(wanted, Mapping) or not wanted:
            raise TypeError(f"{argument} must map a column to the values to keep, got {wanted!r}")
        keep = np.ones(len(self), dtype=bool)
        for name, values in wanted.items():
            labels = as_texts(self.labels(argument, name))
            values = [values] if isinstance(values, str) or not isinstance(values, Iterable) else list(values)
            texts = as_texts(np.array(values, dtype=object))
            for text in texts.tolist():
                if text not in labels:
                    raise ValueError(
                        f"{argument}: {name!r} of {self.title} is never {text!r}; "
                        f"{there_is(np.unique(labels).tolist())}"
                    )
            keep &= np.isin(labels, texts)
        if not keep.any():
            raise ValueError(f"{argument}={dict(wanted)!r} leaves no row of {self.title}: ask for less at once")
        return np.flatnonzero(keep)

    def samples(self, rows: Array | None = None) -> Tensor:
        """Return the finite ``(n, d)`` samples of some rows, float64 if they are stored so and float32 otherwise."""
        samples = self.read(rows)
        if samples.dim() != 2:
            remedy = "add the missing dimension, as in x[:, None]" if samples.dim() == 1 else "flatten each sample"
            raise ValueError(f"{self.title} must have shape (n, d), got {tuple(samples.shape)}: {remedy}")
        if samples.numel() == 0:
            message = f"{self.title} is empty, with shape {tuple(samples.shape)}: it needs at least one sample"
            raise ValueError(message) if len(samples) else NoRowsError(message)
        refuse_not_finite(self.title, samples, rows, self.features, start=self.start)
        return samples


def refuse_not_finite(
    title: str,
    samples: Tensor,
    rows: Array | None = None,
    features: Sequence[str] | None = None,
    *,
    start: int | None = None,
) -> None:
    """Raise for samples that hold NaN or infinity, naming the rows by their numbers, from ``start`` on."""
    # One pass, and no copy, where all is well; two large numbers may overflow in it.
    if not samples.is_floating_point() or bool(samples.detach().sum().isfinite()):
        return
    finite = samples.isfinite()
    bad = (~finite).any(dim=1).nonzero().flatten()
    if len(bad):
        where = [(start or 0) + (int(i) if rows is None else int(rows[int(i)])) for i in bad[:5]]
        shown = ", ".join(map(str, where)) + (", ..." if len(bad) > 5 else "")
        column = int((~finite[bad[0]]).nonzero()[0])
        if start is not None:  # of a block: what follows is not known
            of_column = f" of {features[column]!r}" if features else ""
            raise ValueError(
                f"{title} holds NaN or infinity in row {where[0]}{of_column}: remove or fill it; rows count from 0"
            )
        first = f", first in {features[column]!r}" if features else ""
        raise ValueError(
            f"{title} holds NaN or infinity in {len(bad)} of {len(samples)} rows ({shown}{first}): "
            "remove or fill them; rows count from 0"
        )


def titled(table: Table, argument: str) -> Table:
    """Return the same table as another argument."""
    _, parenthesis, file = table.title.partition(" (")
    return replace(table, title=argument + parenthesis + file)


def as_texts(labels: Array) -> Array:
    """Return labels as strings: whole numbers in floating point as integers, a missing label as ``""``."""
    # A float32 of 0.1 is 0.1, and not what it is as a double.
    small = labels.dtype in (np.float32, np.float16)
    values = [float(str(label)) for label in labels.ravel()] if small else labels.tolist()
    return np.array([_text(label) for label in values], dtype=str)


def _text(label: Any) -> str:
    if label is None or label != label:
        return ""
    if isinstance(label, bytes):
        return label.decode()
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return str(label)


def library(name: str, title: str) -> Any:
    """Return an optional module that reads or writes a file, or say what installs it."""
    return extras.library(name, title, "files")


@contextmanager
def readable(title: str, path: Path, kind: str = "") -> Iterator[None]:
    """Say which file cannot be read, ``" as AnnData"`` for one, where its library refuses it."""
    try:
        yield
    except ModuleNotFoundError:
        raise
    except Exception as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{title}: cannot read {str(path)!r}{kind}: {first_line}") from error


def there_is(names: Iterable[str]) -> str:
    """Return the names as the end of a message."""
    shown = listed(names, 12)
    return f"there is {shown}" if shown else "it has no names"


def objects(series: Any) -> Array:
    """Return a column of labels, with None where one is missing: the missing value of pandas has no truth value."""
    if str(series.dtype) in ("float32", "Float32", "float[pyarrow]"):
        single: Array = series.to_numpy(dtype=np.float32, na_value=np.nan)
        return single
    labels: Array = series.to_numpy(dtype=object, na_value=None)
    return labels


def as_tensor(array: Array) -> Tensor:
    """Return an array as float64 if it is that, and as float32 otherwise."""
    # A copy: read-only arrays and foreign byte orders are welcome, and later changes to the array do no harm.
    return torch.from_numpy(np.array(array, dtype=np.float64 if array.dtype == np.float64 else np.float32))


class RowWriter(Protocol):
    """Writes images block by block."""

    def write(self, block: Table, images: NDArray[Any]) -> None:
        """Append the images of a block."""

    def close(self) -> None:
        """Complete the file."""


@dataclass(frozen=True)
class FrameFile:
    """A file of a data frame, of which the columns are known and the rows are read when they are asked for."""

    names: tuple[str, ...]  # of all columns
    row_names: tuple[str, ...]  # of those that hold names of rows, which are no features
    header: tuple[str, ...]  # names as the file has them, "" for an unnamed column
    length: int | None  # None where the file does not tell before it is read
    first: Any  # the first rows, or none of a file that tells the types of its columns
    # Yields frames of at most so many rows (None: all at once) of some columns, of which some are features.
    frames: Callable[[int | None, Collection[str], Collection[str]], Iterator[Any]]
    metadata: dict[str, Any] | None = None  # what pandas has written of the table beside it


@dataclass(frozen=True)
class Format:
    """How files of some endings are read and written."""

    # Of a title, a path, the name of an array within, and what is read.
    open: Callable[[str, Path, str | None, Reading], Table]
    # Of a path, its ending, the table that is mapped, and its first images.
    writer: Callable[[Path, str, Table, NDArray[Any]], RowWriter] | None = None
    frame: Callable[[str, Path], FrameFile] | None = None  # of a title and a path
    libraries: tuple[str, ...] = ()  # needed to write
    holds_named: bool = False  # a name after "::" in the path means an array within
    holds_anndata: bool = False  # has layers and embeddings
    copies: type | None = None  # the origin of a table that is written as a copy of its file
