"""A trained map applied to a folder of files, by any number of processes, which may die and come back."""

import errno
import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from lightning_gap.checks import check_integer
from lightning_gap.monge.claims import Claim, Claims
from lightning_gap.monge.module import MongeMap
from lightning_gap.monge.samples.files.read import FORMATS, suffix_of
from lightning_gap.monge.samples.files.table import NoRowsError
from lightning_gap.monge.samples.files.write import on_disk
from lightning_gap.monge.transport_files import transport_blocks

__all__ = ["MappedFolder", "transport_folder"]

# Of the folder of images: what was asked for, claims, and parts of files. Readers of tables pass over such names.
_STATE = ".lightning_gap"
_ASKED = "asked.json"
# Nanoseconds between the times that the coarsest file systems, FAT's, can keep.
_COARSEST = 2 * 10**9
# What the system says of one file. Without a number: of its format. A full or a broken disk would befall all.
_OF_ONE_FILE = (
    None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP,
    errno.ENAMETOOLONG,
)  # fmt: skip


@dataclass(frozen=True)
class MappedFolder:
    """What one of perhaps many processes did in a folder, in which all files are now.

    Attributes:
        files: Files in the folder that have images.
        mapped: Those that this process mapped.
        rows: The rows in these.
        others: Files of the source that are no tables or arrays to map or have no rows, and links to folders, which are
            not followed.
    """

    files: int
    mapped: int
    rows: int
    others: tuple[str, ...]


class _LostError(Exception):
    """This process was silent for so long that another has taken over its file."""


def transport_folder(
    model: MongeMap,
    source: str | Path,
    output: str | Path,
    *,
    condition: str | None = None,
    columns: Sequence[str] | None = None,
    batch_size: int = 8192,
    block_size: int | None = None,
    rank: int = 0,
    ranks: int = 1,
    stale_after: float = 60.0,
    progress: Callable[[int, int | None], None] | None = None,
) -> MappedFolder:
    """Write the images of the samples in all files of a folder, at any depth, to files of the same names in another.

    Any number of processes, on any machines that share the folders, may do so at once, by ranks or without: each file
    is claimed by one of them, by a file that only one can create. A process begins with its rank's share, goes on with
    what others have not claimed, and returns when all files are there. What a process that died had claimed is taken
    over, at once on the same system and otherwise after ``stale_after`` seconds of silence. A file appears under its
    name only when it is complete and on the disk. So it may all be ended at any moment and begun again: what is there
    stays, and what is missing is done, with the same bits. A file that is newer than its images, by
    the times of the two, is mapped again; one that was replaced by an older one is not.

    Args:
        model: The map, on its device.
        source: Folder of files as :func:`~lightning_gap.monge.transport_files.transport_file` reads and writes them,
            at any depth. Names that begin with ``.`` or ``_`` are passed over.
        output: Folder of the images, which is made; ``.lightning_gap`` in it holds what was asked for, and claims.
        condition: As of ``transport_file``, for all files.
        columns: As of ``transport_file``.
        batch_size: Rows that go through the network at once.
        block_size: Rows that are read at once; by default what takes 16 MiB in single precision.
        rank: Which of ``ranks`` processes this is, from 0: it begins with every ``ranks``-th file from there on.
        ranks: Processes that work on the folder, as far as they know of each other.
        stale_after: Seconds after which a silent process of another system counts as dead.
        progress: Called with the number of files that are there, and of all.

    Returns:
        What this process did.

    Raises:
        NotADirectoryError: There is no such source, or the output is a file.
        FileExistsError: The output holds files that were not mapped by this map, so asked.
        ValueError: The source has no files to map, one folder is in the other, ``rank`` is none of ``ranks``, or what
            ``transport_file`` raises: of files, when all others are done, with their names.

    Example:
        >>> from lightning_gap.monge.transport_files import load_map
        >>> from lightning_gap.monge.transport_folder import transport_folder
        >>> transport_folder(load_map("map.ckpt"), "cells", "predicted").files  # doctest: +SKIP
        128
    """
    check_integer("batch_size", batch_size)
    check_integer("ranks", ranks)
    if check_integer("rank", rank, 0) >= ranks:
        raise ValueError(f"rank must be below ranks={ranks}, got {rank}")
    folder = _Folder(Path(source).expanduser(), Path(output).expanduser(), stale_after)
    folder.agree(_asked(model, condition, columns, batch_size, block_size))
    options: dict[str, Any] = {
        "condition": condition, "columns": columns, "batch_size": batch_size, "block_size": block_size,
    }  # fmt: skip
    mapped, rows = 0, 0
    failed: dict[str, Exception] = {}
    missing = [name for step in range(ranks) for name in folder.names[(rank + step) % ranks :: ranks]]
    pause = 0.02
    while missing := [name for name in missing if name not in failed and not folder.has(name)]:
        first, before = mapped, mapped + len(failed)
        for name in missing:
            if progress is not None:
                progress(len(folder.names) - len(missing) + mapped - first, len(folder.names))
            if folder.has(name):
                continue
            try:
                done = folder.map(name, model, options)
            except (TypeError, ValueError, OSError) as error:
                if isinstance(error, OSError) and error.errno not in _OF_ONE_FILE:
                    raise
                failed[name] = error
                continue
            if done is not None:
                mapped, rows, pause = mapped + 1, rows + done, 0.02
        if mapped + len(failed) == before:  # all that is missing is in other hands
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
    folder.tidy(failed)
    empty = [name for name, error in failed.items() if isinstance(error, NoRowsError)]
    failed = {name: error for name, error in failed.items() if name not in empty}
    if failed:
        name, reason = next(iter(failed.items()))
        more = f", and {len(failed) - 1} more: {', '.join(list(failed)[1:6])}" if len(failed) > 1 else ""
        raise ValueError(f"{len(failed)} of {len(folder.names)} files cannot be mapped: {name}: {reason}{more}")
    if progress is not None:
        progress(len(folder.names), len(folder.names))
    return MappedFolder(len(folder.names) - len(empty), mapped, rows, tuple(sorted([*folder.others, *empty])))


class _Folder:
    """A folder of samples, that of their images, and what is between."""

    def __init__(self, source: Path, output: Path, stale_after: float) -> None:
        if not source.is_dir():
            raise NotADirectoryError(f"IN: there is no folder {str(source)!r} in {str(Path.cwd())!r}")
        if output.exists() and not output.is_dir():
            raise NotADirectoryError(f"OUT: {str(output)!r} is a file, and IN is a folder: name a folder")
        one, other = source.resolve(), output.resolve()
        if one == other or one in other.parents or other in one.parents:
            raise ValueError(f"OUT: {str(output)!r} and IN are in one another: name a folder beside it")
        self.source, self.output = source, output
        names: list[str] = []
        others: list[str] = []
        for path in sorted(source.rglob("*")):
            place = path.relative_to(source)
            if any(part.startswith((".", "_")) for part in place.parts) or (path.is_dir() and not path.is_symlink()):
                continue
            # A link to a folder is not followed, which could lead in circles, but named.
            form = None if path.is_dir() else FORMATS.get(suffix_of(path) or "")
            (names if form is not None and form.writer is not None else others).append(place.as_posix())
        if not names:
            written = ", ".join(suffix for suffix, form in FORMATS.items() if form.writer is not None)
            raise ValueError(f"IN: the folder {str(source)!r} has no file whose name ends in one of {written}")
        self.names, self.others = names, tuple(others)
        self._claims = Claims(output / _STATE / "claims", stale_after)

    def has(self, name: str) -> bool:
        """Return whether the images of a file are there, and not older than it."""
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):  # mapping it says what is wrong
            return (self.output / name).stat().st_mtime_ns >= (self.source / name).stat().st_mtime_ns
        return False

    def agree(self, asked: dict[str, Any]) -> None:
        """Note what is asked for, or refuse where the folder has images of something else."""
        noted = self.output / _STATE / _ASKED
        while True:
            if noted.is_file():
                before = self._noted(noted)
                if changed := [key for key in asked if before.get(key) != asked[key]]:
                    raise FileExistsError(
                        f"OUT: {str(self.output)!r} has images of another {' and '.join(changed)}: choose another "
                        "folder, or delete this one"
                    )
                return
            there = next((name for name in self.names if (self.output / name).exists()), None)
            if there is not None and not noted.is_file():  # which another process may have written between
                raise FileExistsError(
                    f"OUT: {str(self.output)!r} has a {there} that this command has not written: choose another folder"
                )
            if there is None:
                self._note(noted, asked)

    def _noted(self, noted: Path) -> dict[str, Any]:
        """Return what was asked for, which another process may be writing just now."""
        for pause in (0.01, 0.1, 1.0, 2.0, None):
            with suppress(ValueError):
                before = json.loads(noted.read_bytes())
                if isinstance(before, dict):
                    return before
            if pause is not None:
                time.sleep(pause)
        raise ValueError(
            f"OUT: {str(noted)!r} is damaged, which says what {str(self.output)!r} has images of: delete that folder, "
            "or choose another"
        )

    def _note(self, noted: Path, asked: dict[str, Any]) -> None:
        """Write what is asked for as a whole, if nobody has."""
        part, content = noted.with_name(f"asked.{uuid.uuid4().hex}"), json.dumps(asked, indent=1) + "\n"
        try:
            noted.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(content, encoding="utf-8")
        except OSError as error:
            raise ValueError(f"OUT: cannot write {str(self.output)!r}: {error.strerror}; choose another") from error
        on_disk(part)
        try:
            os.link(part, noted)
        except (FileExistsError, FileNotFoundError):  # another was first, and has tidied
            pass
        except OSError:  # a file system without links: not whole at once, but by one process
            with suppress(FileExistsError), noted.open("x", encoding="utf-8") as file:
                file.write(content)
            on_disk(noted)
        part.unlink(missing_ok=True)

    def map(self, name: str, model: MongeMap, options: dict[str, Any]) -> int | None:
        """Map a file if no other process has it; return its rows, or None where this process did not."""
        with self._claims.held(name) as claim:
            if claim is None:
                return None
            part = self._part(claim)
            for number in range(claim.number):  # of holders that have died
                for left in part.parent.glob(f"{claim.key}.{number}.*"):
                    left.unlink(missing_ok=True)
            if self.has(name):  # since this process has looked
                claim.release(done=True)
                return None
            given = self.source / name
            as_given = given.stat()

            def finished(complete: Path) -> None:
                if not claim.holds():
                    raise _LostError
                now = given.stat()
                if (now.st_mtime_ns, now.st_size) != (as_given.st_mtime_ns, as_given.st_size):
                    raise ValueError("it changed while it was mapped: begin again when it is complete")
                # Clocks of file systems and machines differ: images are never older than their samples.
                at = max(time.time_ns(), now.st_mtime_ns)
                os.utime(complete, ns=(at, at))
                if complete.stat().st_mtime_ns < now.st_mtime_ns:  # kept in seconds, or in every other one
                    at = -(-now.st_mtime_ns // _COARSEST) * _COARSEST
                    os.utime(complete, ns=(at, at))

            part.parent.mkdir(parents=True, exist_ok=True)
            (self.output / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                rows = transport_blocks(
                    model, given, self.output / name, overwrite=True, part=part, finished=finished, **options
                )
            except _LostError:
                return None
            except OSError:
                if claim.holds():
                    raise
                return None  # who took over has removed the part
            claim.release(done=True)
            return rows

    def _part(self, claim: Claim) -> Path:
        return self.output / _STATE / "parts" / f"{claim.key}.{claim.number}.{claim.token}"

    def tidy(self, failed: dict[str, Exception]) -> None:
        """Leave nothing of processes that died, nor parts of those that were taken for dead."""
        self._claims.forget(name for name in self.names if name not in failed)
        for left in (self.output / _STATE).glob("asked.*"):
            if left.name != _ASKED:
                left.unlink(missing_ok=True)
        for left in (self.output / _STATE / "parts").glob("*.*.*"):
            key, number, token = left.name.split(".")[:3]
            if not Claim(self._claims.folder, key, int(number), token).holds():
                with suppress(OSError):  # gone, or open where open files stay
                    left.unlink()
        for folder in ("claims", "parts"):
            with suppress(OSError):  # not there, or another process is in it
                (self.output / _STATE / folder).rmdir()


def _asked(
    model: MongeMap, condition: str | None, columns: Sequence[str] | None, batch_size: int, block_size: int | None
) -> dict[str, Any]:
    """Return what decides the images' bits, as far as it is asked for."""
    digest = sha256(repr((model.map, model.feature_names, model.condition_names)).encode())
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {
        "map": digest.hexdigest(), "condition": condition, "columns": None if columns is None else list(columns),
        "batch size": batch_size, "block size": block_size,
    }  # fmt: skip
