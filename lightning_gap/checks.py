"""Checks of what classes and functions are given: one for integers, one for numbers, one for choices."""

import math
import warnings
from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeVar

__all__ = ["check_choice", "check_count", "check_integer", "check_number", "renamed"]

T = TypeVar("T")


def check_integer(name: str, value: Any, least: int = 1, what: str = "") -> int:
    """Return an integer that is large enough.

    Args:
        name: The caller's argument, for the message.
        value: What the caller was given.
        least: The smallest that will do.
        what: What the number is of, for the message.

    Raises:
        TypeError: It is no integer (a bool is none).
        ValueError: It is smaller.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}{what and f': {what}'}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}{what and f': {what}'}")
    return value


check_count = check_integer


def check_number(name: str, value: Any, *, least: float | None = None, above: float | None = None) -> float:
    """Return a finite number that is large enough, as a plain float.

    Args:
        name: The caller's argument, for the message.
        value: What the caller was given: a number, or an array or a tensor that holds one.
        least: The smallest that will do; or else
        above: What it must be larger than.

    Raises:
        ValueError: It is anything else (a bool is no number).
    """
    number = value.item() if getattr(value, "shape", None) in ((), (1,)) else value
    valid = not isinstance(number, bool) and isinstance(number, Real) and math.isfinite(number)
    if not valid or (least is not None and number < least) or (above is not None and number <= above):
        bound = f" of at least {least}" if least is not None else f" above {above}" if above else ""
        raise ValueError(f"{name} must be a {'positive ' if above == 0 else ''}finite number{bound}, got {value!r}")
    return float(number)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ``ValueError`` unless the value is one of the choices.

    Args:
        name: The caller's argument, for the message.
        value: What the caller was given.
        choices: What it may be.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def renamed(old: str, new: str, given: T | None, value: T | None) -> T | None:
    """Return the value of an argument that has been renamed, under whichever name it came.

    Args:
        old: The old name; a ``DeprecationWarning`` tells users of it.
        new: The new name.
        given: What came by the old name; ``None`` for nothing.
        value: What came by the new one.

    Raises:
        TypeError: It came by both.
    """
    if given is None:
        return value
    if value is not None:
        raise TypeError(f"{old} is the old name of {new}: give {new} alone")
    warnings.warn(f"{old} is called {new} now: write {new}={given!r}", DeprecationWarning, stacklevel=3)
    return given
