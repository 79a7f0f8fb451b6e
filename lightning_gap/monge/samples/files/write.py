"""Files of images, written block by block in constant memory."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from lightning_gap.monge.samples.files.read import FORMATS, suffix_of
from lightning_gap.monge.samples.files.table import RowWriter, Table, library

__all__ = ["Output", "on_disk"]

Array = NDArray[Any]


class Output:
    """A file that appears under its name only when it is complete, and on the disk.

    Until then it is ``part``, by default a hidden file beside it that bears this process's number.
    """

    def __init__(
        self, argument: str, location: str, table: Table, *, overwrite: bool, part: Path | None = None
    ) -> None:
        self.path = Path(location).expanduser()
        self._suffix = suffix_of(self.path) or ""
        form = FORMATS.get(self._suffix)
        if form is None or form.writer is None or "::" in location:
            written = ", ".join(suffix for suffix, form in FORMATS.items() if form.writer is not None)
            raise ValueError(f"{argument}: cannot write {location!r}: the name must end in one of {written}")
        if form.copies is not None and not isinstance(table.origin, form.copies):
            raise ValueError(
                f"{argument}: {self.path.name} is a copy of AnnData with the images in it, and {table.title} is none: "
                "write an .npy, .csv or .parquet file"
            )
        for name in form.libraries:
            library(name, argument)
        if self.path.is_dir():
            raise ValueError(f"{argument}: {str(self.path)!r} is a folder: name a file")
        if self.path.exists() and not overwrite:
            raise FileExistsError(f"{argument}: {str(self.path)!r} exists: choose another name, or give --overwrite")
        self.part = part or self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            self.part.touch()
        except OSError as error:
            raise ValueError(
                f"{argument}: cannot write {str(self.path)!r}: {error.strerror}; choose another folder"
            ) from error
        self._table = table
        self._make = form.writer
        self._writer: RowWriter | None = None

    def write(self, block: Table, images: Array) -> None:
        """Append the images of a block."""
        if self._writer is None:
            self._writer = self._make(self.part, self._suffix, self._table, images)
        self._writer.write(block, images)

    def keep(self, finished: Callable[[Path], None] | None = None) -> None:
        """Complete the file and give it its name; ``finished`` is called with the part before, and may raise."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if finished is not None:
            finished(self.part)
        on_disk(self.part)
        os.replace(self.part, self.path)
        on_disk(self.path.parent)

    def discard(self) -> None:
        """Leave nothing behind."""
        if self._writer is not None:
            with suppress(Exception):
                self._writer.close()
        self.part.unlink(missing_ok=True)


def on_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would outlive a power failure; where a system can tell."""
    with suppress(OSError):  # folders cannot be opened on Windows, nor synchronized on some file systems
        file = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
        try:
            os.fsync(file)
        finally:
            os.close(file)
