"""C++ of this package, compiled for the processor on first use and kept."""

import atexit
import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from torch import Tensor

__all__ = ["compiler", "native_argument", "native_library"]

# GCC takes half as wide vectors as the processor has, unless told.
_FAST = ("-march=native", "-mprefer-vector-width=512")
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
_SECONDS = 300


def compiler() -> str | None:
    """Return the C++ compiler: ``CXX``, with its arguments, else ``g++`` or ``clang++``; ``None`` where none is."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named and shutil.which(named[0]):
        return shlex.join(named)
    return shutil.which("g++") or shutil.which("clang++")


def native_library(source: Path, expressions: Mapping[str, str]) -> ctypes.CDLL | None:
    """Return a source compiled with some macros, or ``None`` where that cannot be done.

    It is compiled once for each processor, compiler and set of macros, in some seconds, and kept in
    ``lightning_gap`` under ``XDG_CACHE_HOME`` (``~/.cache``). Where there is a compiler that fails, that is warned of.

    Args:
        source: The C++ file.
        expressions: Macros, and what they stand for.
    """
    return _native_library(source, tuple(expressions.items()), compiler())


def native_argument(value: Tensor | float | None) -> ctypes.c_void_p | ctypes.c_long | ctypes.c_double:
    """Return a tensor's memory, a null pointer for ``None``, an int as a ``long`` and a float as a ``double``."""
    if value is None:
        return ctypes.c_void_p()
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_long(value) if isinstance(value, int) else ctypes.c_double(value)


@cache
def _native_library(source: Path, expressions: tuple[tuple[str, str], ...], program: str | None) -> ctypes.CDLL | None:
    if program is None or sys.platform == "win32":
        return None
    macros = [f"-D{name}={text}" for name, text in expressions]
    words, name = shlex.split(program), source.name
    try:
        flags = [*_FLAGS, *_fast_flags(program)]
        known = "\n".join([_text(source), *macros, *flags, _run([*words, "--version"]), program, _processor()])
        path = _folder() / f"{source.stem}-{hashlib.sha256(known.encode()).hexdigest()[:24]}.so"
        command = [*words, *flags, *macros, str(source)]
        if not path.exists():
            _compile(command, path)
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # cut short, as by a full disk; or of a folder from which nothing may be run
            path = _own_folder() / path.name
            _compile(command, path)
            return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        told = str(getattr(error, "stderr", None) or error).strip().splitlines()
        warnings.warn(
            f"{words[0]} does not make {name} run here, so slower code is taken: {' '.join(told[:1])}",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


def _text(source: Path) -> str:
    """Return a source and the files beside it that it includes."""
    text = source.read_text()
    included = re.findall(r'^#include "(.+)"', text, re.MULTILINE)
    return "\n".join([text, *(_text(source.parent / name) for name in included)])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=True)
    return done.stdout


def _compile(command: list[str], path: Path) -> None:
    # Under a name of its own first: several processes may come at once.
    handle, made = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        _run([*command, "-o", made])
        Path(made).replace(path)
    finally:
        Path(made).unlink(missing_ok=True)


@cache
def _fast_flags(program: str) -> tuple[str, ...]:
    """Return the flags that make use of the processor, as far as a compiler knows them."""
    for flags in (_FAST, _FAST[:1], ("-mcpu=native",)):
        try:
            _run([*shlex.split(program), *flags, "-x", "c++", os.devnull, "-fsyntax-only"])
        except subprocess.CalledProcessError:
            continue
        return flags
    return ()


@cache
def _folder() -> Path:
    """Return where libraries are kept: of this user alone, or they could be another's code."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_gap"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            kept = folder.stat()
    except (OSError, RuntimeError):
        return _own_folder()
    ours = kept.st_uid == os.getuid() and not kept.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if ours else _own_folder()


@cache
def _own_folder() -> Path:
    """Return a folder that lasts as long as this process."""
    folder = tempfile.mkdtemp(prefix="lightning_gap-")
    atexit.register(_remove, folder, os.getpid())
    return Path(folder)


def _remove(folder: str, owner: int) -> None:
    # A fork that ends has the parent's folder, which the parent goes on with.
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


@cache
def _processor() -> str:
    """Return what tells this processor's instructions from another's, which may share the folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = [line for line in lines if line.startswith(("flags", "Features", "model name", "vendor_id"))]
    return "\n".join([platform.machine(), platform.processor(), *sorted(set(found))])
