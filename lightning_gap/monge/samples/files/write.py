"""Files of images, written block by block in constant memory."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from lightning_gap.monge.samples.files.read import FORMATS, suffix_of
from lightning_gap.monge.samples.files.table import RowWriter, Table, library

__all__ = ["Output"]

Array = NDArray[Any]


class Output:
    """A file that appears under its name only when it is complete."""

    def __init__(self, argument: str, location: str, table: Table, *, overwrite: bool) -> None:
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
        self.part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
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
