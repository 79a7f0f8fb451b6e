"""Help that takes seconds to make, kept while nothing that it was made from has changed."""

import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from hashlib import sha256
from importlib.machinery import PathFinder
from pathlib import Path

__all__ = ["print_help"]

# What help is made from: where they are found decides which files are loaded.
_PACKAGES = ("lightning_gap", "lightning", "jsonargparse", "torch")
# What argparse asks of the environment for a text's look.
_LOOK = ("NO_COLOR", "FORCE_COLOR", "PYTHON_COLORS", "TERM")


def print_help(command: str, make: Callable[[], None]) -> None:
    """Print a command's help: as it was kept, or as ``make`` prints it, which is kept then.

    It is kept in ``lightning_gap`` under ``XDG_CACHE_HOME`` (``~/.cache``), with the times and sizes of all source
    files that were loaded when it was made. It is made anew when one of these has changed, when anything is installed,
    updated or removed, and for windows of another width.

    Args:
        command: Which one.
        make: Prints it, and may end by ``SystemExit``.
    """
    path = _folder() / f"help-{command}-{_circumstances()}.json"
    kept = _kept(path)
    if kept is not None:
        sys.stdout.write(kept)
        return
    made, ended = io.StringIO(), None
    with redirect_stdout(made):
        try:
            make()
        except SystemExit as error:
            ended = error
    sys.stdout.write(made.getvalue())
    if ended is None or not ended.code:
        _keep(path, made.getvalue())
    if ended is not None:
        raise ended


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_gap"


def _circumstances() -> str:
    """Return a digest of what help depends on besides the files that are loaded."""
    places = [_place(name) for name in _PACKAGES]
    look = [os.environ.get(name) for name in _LOOK]
    width, plain = shutil.get_terminal_size().columns, not sys.stdout.isatty()
    return sha256(repr((sys.version, places, look, width, plain)).encode()).hexdigest()[:16]


def _place(name: str) -> str | None:
    spec = PathFinder.find_spec(name)
    return spec.origin if spec is not None else None


def _installed() -> list[list[str | int]]:
    """Return the packages installed beside those that are loaded: their names bear their versions."""
    found: list[list[str | int]] = []
    for folder in sorted({str(Path(place).parents[1]) for name in _PACKAGES if (place := _place(name))}):
        with suppress(OSError), os.scandir(folder) as entries:
            found += sorted(
                [entry.name, entry.stat().st_mtime_ns]
                for entry in entries
                if entry.name.endswith((".dist-info", ".egg-info", ".egg-link", ".pth"))
            )
    return found


def _loaded() -> Iterator[list[str | int]]:
    """Yield the source files that are loaded, with times and sizes."""
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and file.endswith(".py"):
            with suppress(OSError):
                status = os.stat(file)
                yield [os.path.abspath(file), status.st_mtime_ns, status.st_size]


def _kept(path: Path) -> str | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(path.read_bytes())
        if kept["installed"] == _installed() and all(
            (status.st_mtime_ns, status.st_size) == (time, size)
            for file, time, size in kept["files"]
            for status in [os.stat(file)]
        ):
            return str(kept["help"])
    return None


def _keep(path: Path, text: str) -> None:
    content = json.dumps({"help": text, "installed": _installed(), "files": list(_loaded())})
    with suppress(OSError):  # a folder that cannot be written: help is made each time
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as part:
            part.write(content)
        os.replace(part.name, path)
