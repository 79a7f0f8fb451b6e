"""What the commands share: a parser whose errors are one line, and the kinds of argument."""

import argparse
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["CommandError", "Parser", "at_least", "between", "numbers", "positive", "write_text"]


class CommandError(Exception):
    """What a command cannot do, in one line that says why and what to do; exit code 2."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and whose options are not abbreviated."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def at_least(least: int) -> Callable[[str], int]:
    """Return a type of argument: whole numbers from ``least`` on."""

    def integer(text: str) -> int:
        try:
            value = int(text.replace("_", ""))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small: give at least {least}")
        return value

    return integer


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def positive(text: str) -> float:
    """A type of argument: numbers greater than 0."""
    value = _finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is too small: give a number greater than 0")
    return value


def between(low: float, high: float) -> Callable[[str], float]:
    """Return a type of argument: numbers from ``low`` to ``high``."""

    def number(text: str) -> float:
        value = _finite(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range: give a number from {low:g} to {high:g}")
        return value

    return number


def numbers(text: str) -> tuple[int, ...]:
    """A type of argument: increasing whole numbers with commas between them, as 30,60,80."""
    values = tuple(at_least(1)(word) for word in text.split(","))
    if any(later <= earlier for earlier, later in pairwise(values)):
        raise argparse.ArgumentTypeError(f"{text!r} does not increase")
    return values


def write_text(option: str, path: Path, text: str) -> None:
    """Write a file that an option names, and its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot write {option} {path}: {error.strerror}; choose another file") from None
