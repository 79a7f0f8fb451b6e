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
    """A file of a data frame, of which the columns are known and the rows are read when they are asked for.

    Attributes:
        names: Names of all columns, those of row names among them.
        row_names: Names of the columns that hold names of rows, which are no features.
        header: Names as the file has them: none for an unnamed column.
        length: Number of rows, where the file tells before it is read.
        first: The first rows, or none of a file that tells the types of its columns.
        frames: Yields data frames of at most so many rows, or one of all where ``None``: of some columns, in the file's
            order, of which some are the features.
        metadata: What pandas has written of the table beside it.
    """

    names: tuple[str, ...]
    row_names: tuple[str, ...]
    header: tuple[str, ...]
    length: int | None
    first: Any
    frames: Callable[[int | None, Collection[str], Collection[str]], Iterator[Any]]
    metadata: dict[str, Any] | None = None


@dataclass(frozen=True)
class Format:
    """How files of some endings are read and written.

    Attributes:
        open: Returns the table of a file: of its title, its path, the name of an array within it, and what is read.
        writer: Makes what writes a file: of its path, its ending, the table that is mapped, and its first images.
        frame: Opens a file of a data frame, of its title and path; ``None`` where it is none.
        libraries: Optional modules that writing needs.
        holds_named: Whether a name after ``::`` in the path means an array within.
        holds_anndata: Whether it has layers and embeddings.
        copies: What a table must be from, where a file is written as a copy of its like.
    """

    open: Callable[[str, Path, str | None, Reading], Table]
    writer: Callable[[Path, str, Table, NDArray[Any]], RowWriter] | None = None
    frame: Callable[[str, Path], FrameFile] | None = None
    libraries: tuple[str, ...] = ()
    holds_named: bool = False
    holds_anndata: bool = False
    copies: type | None = None
