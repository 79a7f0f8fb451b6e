"""What every format of a file of samples is to who reads and writes them."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from lightning_gap.monge.samples.files.table import Reading, Table

__all__ = ["Format", "FrameFile", "RowWriter"]


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
