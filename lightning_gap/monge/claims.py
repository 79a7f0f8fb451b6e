"""Claims of pieces of work by many processes that share a folder, and nothing else.

A claim is a file that only one process can create. That of a process that has died is not taken away, which two could
do at once, but followed by one of the next number, which again only one can create: the highest number holds.
"""

import json
import os
import threading
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from lightning_gap.checks import check_number

__all__ = ["Claim", "Claims"]


@dataclass(frozen=True)
class Claim:
    """A piece of work that this process holds.

    Attributes:
        folder: Where the claims are.
        key: What is claimed, as a name of a file.
        number: How many holders have died before this one.
        token: Unique to this claim.
    """

    folder: Path
    key: str
    number: int
    token: str

    @property
    def path(self) -> Path:
        """The file."""
        return _path(self.folder, self.key, self.number)

    def holds(self) -> bool:
        """Return whether the work is still this process's: one that was silent for too long may have lost it."""
        return not _path(self.folder, self.key, self.number + 1).exists() and _token(self.path) == self.token

    def release(self, *, done: bool) -> None:
        """Give the work back, to be claimed anew; or, where it is done, leave no claim of it."""
        # From above, so that no number is free below one that holds.
        for number in range(self.number, -1 if done else self.number - 1, -1):
            if done or self.holds():
                _path(self.folder, self.key, number).unlink(missing_ok=True)


@dataclass
class Claims:
    """The claims in a folder.

    Whether a holder is dead is known at once of a process of the same system, by its number and its start. Of any
    other, on another machine or in another container, it is known by its silence: a holder touches its claim again and
    again. Clocks of machines are not compared.

    Args:
        folder: Where the claims are; made when it is needed.
        stale_after: Seconds of silence after which a holder counts as dead.

    Raises:
        ValueError: ``stale_after`` is no positive number.

    Example:
        >>> from tempfile import mkdtemp
        >>> claims = Claims(Path(mkdtemp()), stale_after=60)
        >>> with claims.held("part-0.parquet") as claim:
        ...     print(claim is not None, claims.take("part-0.parquet"))
        True None
    """

    folder: Path
    stale_after: float = 60.0
    # When a claim was touched last, and since when this process has seen it so; and those that were warned of.
    _seen: dict[Path, tuple[int, float]] = field(default_factory=dict)
    _warned: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        check_number("stale_after", self.stale_after, above=0)

    def take(self, what: str) -> Claim | None:
        """Return a claim, or None where a process that may be alive has it."""
        key, token, number = _key(what), uuid.uuid4().hex, 0
        content = json.dumps({"what": what, "token": token, **_this_process()}).encode()
        while True:
            path = _path(self.folder, key, number)
            try:
                file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                if not self._is_dead(path):
                    return None
                number += 1
                continue
            except FileNotFoundError:
                self.folder.mkdir(parents=True, exist_ok=True)
                continue
            try:
                try:
                    os.write(file, content)
                finally:
                    os.close(file)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            return Claim(self.folder, key, number, token)

    @contextmanager
    def held(self, what: str) -> Iterator[Claim | None]:
        """Yield :meth:`take`, touched until the end; what raises gives it back, what is done is to be released."""
        claim = self.take(what)
        if claim is None:
            yield None
            return
        ended = threading.Event()
        beating = threading.Thread(target=self._touch, args=(claim, ended), daemon=True)
        try:
            beating.start()
            yield claim
        except BaseException:
            claim.release(done=False)
            raise
        finally:
            ended.set()
            if beating.is_alive():
                beating.join()

    def forget(self, done: Iterable[str]) -> None:
        """Remove the claims of work that is done, of holders that died before they could."""
        keys = {_key(what) for what in done}
        for path in self.folder.glob("*.*"):
            if path.stem in keys and self._is_dead(path):
                path.unlink(missing_ok=True)

    def _touch(self, claim: Claim, ended: threading.Event) -> None:
        while not ended.wait(self.stale_after / 6):
            try:
                os.utime(claim.path)
            except FileNotFoundError:
                return
            except OSError:  # of a moment, as of a server of files that starts again
                continue

    def _is_dead(self, path: Path) -> bool:
        try:
            holder, touched = _content(path), path.stat().st_mtime_ns
        except FileNotFoundError:
            return False  # just released: to be tried again
        alive = _is_alive(holder)
        if alive is False:
            return True
        last, since = self._seen.get(path, (None, 0.0))
        if last != touched:
            self._seen[path] = touched, time.monotonic()
            return False
        silent = time.monotonic() - since > self.stale_after
        if alive and silent and path not in self._warned:  # stopped, or interrupted at a bad moment
            self._warned.add(path)
            warnings.warn(
                f"{holder.get('what')} is waited for: process {holder['pid']} has it, which lives but was silent "
                f"for {self.stale_after:g} seconds: let it go on, end it, or delete {str(path)!r}",
                stacklevel=2,
            )
        return silent and not alive


def _key(what: str) -> str:
    return sha256(what.encode()).hexdigest()[:24]


def _path(folder: Path, key: str, number: int) -> Path:
    return folder / f"{key}.{number}"


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return {}  # created, and not written yet
    return content if isinstance(content, dict) else {}


def _token(path: Path) -> Any:
    try:
        return _content(path).get("token")
    except FileNotFoundError:
        return None


def _system() -> str | None:
    """Return what names this system's processes: its boot, and the namespace that their numbers belong to."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None  # not Linux


def _started(pid: int) -> str | None:
    """Return when a process of this system started, or None where it has ended; raise OSError where none is shown."""
    state, *rest = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return None if state in (b"Z", b"X") else rest[18].decode()


def _this_process() -> dict[str, Any]:
    system = _system()
    return {"system": system, "pid": os.getpid(), "started": None if system is None else _started(os.getpid())}


def _is_alive(holder: dict[str, Any]) -> bool | None:
    """Return whether a holder lives, or None where that cannot be asked."""
    system = _system()
    if system is None or holder.get("system") != system:
        return None
    try:
        started = _started(int(holder["pid"]))
    except (OSError, ValueError):
        # /proc may hide the processes of other users.
        return None if _has_number(int(holder["pid"])) else False
    return started is not None and started == holder["started"]


def _has_number(pid: int) -> bool:
    """Return whether a process of this system, of whatever user, has a number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True
