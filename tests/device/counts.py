"""What a computation costs on a device beside its arithmetic: waits of the host, copies to the device and launches."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

# Frames that are looked for, and how a place in them is written.
_PACKAGE = "lightning_gap/"


@dataclass
class Counts:
    """Counters by place in the package, ``file:line operation``.

    Args:
        syncs: The host waits for the device: for a number, a copy, or a shape that values decide.
        uploads: Copies from the host to the device.
        launches: Kernels that are started.
    """

    syncs: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)

    def table(self, name: str, most: int = 30) -> str:
        """Return the places of one counter, the greatest first."""
        places: Counter[str] = getattr(self, name)
        rows = [f"{count:6d}  {place}" for place, count in places.most_common(most)]
        if len(places) > most:
            rows.append(f"        and {len(places) - most} places more")
        return "\n".join([f"{places.total()} {name}", *rows])


_open: list[Counts] = []


@contextmanager
def counting() -> Iterator[Counts]:
    """Count what is done in the block."""
    counts = Counts()
    _open.append(counts)
    try:
        yield counts
    finally:
        _open.remove(counts)


def is_counting() -> bool:
    """Whether anything counts."""
    return bool(_open)


def note(name: str, operation: str) -> None:
    """Add one to a counter, at the innermost place of the package that is being run."""
    if _open:
        place = f"{_place()} {operation}"
        for counts in _open:
            getattr(counts, name)[place] += 1


def _place() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if _PACKAGE in name:
            return f"{name[name.rindex(_PACKAGE) :]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"
