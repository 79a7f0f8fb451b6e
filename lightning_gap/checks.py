"""Checks of what classes and functions are given: one for integers, one for numbers, one for choices."""

import math
import warnings
from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeVar

__all__ = ["check_choice", "check_integer", "check_number", "renamed"]

T = TypeVar("T")


def check_integer(name: str, value: Any, least: int = 1, what: str = "") -> int:
    """Return an integer, which a bool is not, of at least ``least``; ``what`` says in messages what it counts."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}{what and f': {what}'}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}{what and f': {what}'}")
    return value


def check_number(name: str, value: Any, *, least: float | None = None, above: float | None = None) -> float:
    """Return a finite number, or what a tensor or array of one number holds, as a plain float; a bool is none."""
    number = value.item() if getattr(value, "shape", None) in ((), (1,)) else value
    valid = not isinstance(number, bool) and isinstance(number, Real) and math.isfinite(number)
    if not valid or (least is not None and number < least) or (above is not None and number <= above):
        bound = f" of at least {least}" if least is not None else f" above {above}" if above else ""
        raise ValueError(f"{name} must be a {'positive ' if above == 0 else ''}finite number{bound}, got {value!r}")
    return float(number)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ``ValueError`` unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def renamed(old: str, new: str, given: T | None, value: T | None) -> T | None:
    """Return the value of an argument that has been renamed; warn where it came by its old name, and refuse both."""
    if given is None:
        return value
    if value is not None:
        raise TypeError(f"{old} is the old name of {new}: give {new} alone")
    warnings.warn(f"{old} is called {new} now: write {new}={given!r}", DeprecationWarning, stacklevel=3)
    return given
