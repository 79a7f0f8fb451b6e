"""Checks of the numbers that classes and functions are given."""

import math
from typing import Any

__all__ = ["check_count", "check_integer", "check_number"]


def check_count(name: str, value: Any, least: int = 1, what: str = "") -> int:
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


def check_integer(name: str, value: Any, least: int = 1) -> int:
    """Return the value if it is an integer that is large enough, with one kind of error for all that is not.

    Args:
        name: The caller's argument, for the message.
        value: What the caller was given.
        least: The smallest that will do.

    Raises:
        ValueError: It is anything else (a bool is no integer).
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return value


def check_number(name: str, value: Any, *, least: float | None = None, above: float | None = None) -> float:
    """Return a finite number that is large enough.

    Args:
        name: The caller's argument, for the message.
        value: What the caller was given.
        least: The smallest that will do; or else
        above: What it must be larger than.

    Raises:
        ValueError: It is anything else (a bool is no number).
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (least is not None and value < least) or (above is not None and value <= above):
        bound = f" of at least {least}" if least is not None else "" if above is None else f" above {above}"
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")
    return float(value)
