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

# What help is made from: where they are found decides which files are loaded. jsonargparse asks for the last ones.
_PACKAGES = ("lightning_gap", "lightning", "jsonargparse", "torch", "docstring_parser", "ruyaml", "ruamel", "yaml")
# What argparse asks of the environment for a text's look.
_LOOK = ("NO_COLOR", "FORCE_COLOR", "PYTHON_COLORS", "TERM")
# How many texts of a command are kept, for windows of several widths: each lists thousands of files.
_TEXTS = 6


def print_help(command: str, make: Callable[[], None]) -> None:
    """Print a command's help: as it was kept, or as ``make`` prints it, which is kept then.

    It is kept in ``lightning_gap`` under ``XDG_CACHE_HOME`` (``~/.cache``), with the times and sizes of all source
    files that were loaded when it was made. It is made anew when one of these has changed, when anything is installed,
    updated or removed, for windows of another width, and by an interpreter with other flags or another path. The last
    few texts of a command are kept; where there is no folder for them, none is.

    Args:
        command: Which one.
        make: Prints it, and may end by ``SystemExit``.
    """
    folder, installed = _folder(), _installed()  # before anything that is loaded changes the path
    path = folder and folder / f"help-{command}-{_circumstances()}.json"
    kept = _kept(path, installed) if path is not None else None
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
    if path is not None and (ended is None or not ended.code):
        _keep(path, made.getvalue(), installed)
        _forget(path.parent, f"help-{command}-*")
    if ended is not None:
        raise ended


def _folder() -> Path | None:
    with suppress(RuntimeError):  # a user without a home
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_gap"
    return None


def _circumstances() -> str:
    """Return a digest of what help depends on besides the files that are loaded."""
    places = [_place(name) for name in _PACKAGES]
    look = [os.environ.get(name) for name in _LOOK]
    width, plain = shutil.get_terminal_size().columns, not sys.stdout.isatty()
    return sha256(repr((sys.version, sys.flags, _path(), places, look, width, plain)).encode()).hexdigest()[:16]


def _path() -> list[str]:
    """Return where modules are found, without the script's or the working folder: that is asked for packages alone."""
    return list(dict.fromkeys(sys.path[1:]))


def _place(name: str) -> str | None:
    spec = PathFinder.find_spec(name)
    if spec is None:
        return None
    return spec.origin or next(iter(spec.submodule_search_locations or ()), None)


def _installed() -> list[list[str | int]]:
    """Return the packages installed where modules are found: their names bear their versions."""
    found: list[list[str | int]] = []
    beside = [os.path.dirname(os.path.dirname(place)) for name in _PACKAGES if (place := _place(name))]
    for folder in sorted({*_path(), *beside}):
        with suppress(OSError), os.scandir(folder or os.curdir) as entries:
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


def _kept(path: Path, installed: list[list[str | int]]) -> str | None:
    with suppress(Exception):  # whatever is wrong with it, it is made anew
        kept = json.loads(path.read_bytes())
        text = kept["help"]
        text.encode(sys.stdout.encoding or "utf-8")
        if kept["installed"] == installed and all(
            (status.st_mtime_ns, status.st_size) == (time, size)
            for file, time, size in kept["files"]
            for status in [os.stat(file)]
        ):
            return str(text)
    return None


def _keep(path: Path, text: str, installed: list[list[str | int]]) -> None:
    with suppress(Exception):  # as where a folder cannot be written: help is made each time
        content = json.dumps({"help": text, "installed": installed, "files": list(_loaded())})
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=f"{path.stem}-", dir=path.parent)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(content)
            os.replace(part, path)
        finally:
            Path(part).unlink(missing_ok=True)


def _forget(folder: Path, pattern: str) -> None:
    """Remove all but the last few texts, and what processes left that were ended as they wrote."""
    with suppress(OSError):
        texts = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns)
        for path in texts[:-_TEXTS]:
            path.unlink(missing_ok=True)
