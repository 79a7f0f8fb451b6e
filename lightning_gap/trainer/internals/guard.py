"""What a private name holds, and an error that says which is gone."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

__all__ = ["PrivateNameGoneError", "bound", "private", "set_private"]

_GONE = object()


class PrivateNameGoneError(RuntimeError):
    """A private name that this package needs is not in the installed version of the package that it is of."""

    def __init__(self, holder: Any, name: str, library: str) -> None:
        try:
            installed = version(library)
        except PackageNotFoundError:
            installed = "(of unknown version)"
        where = getattr(holder, "__name__", None) or type(holder).__name__
        super().__init__(
            f"{library} {installed} has no {where}.{name}, which lightning_gap needs: install an older {library}, or "
            "the newest lightning_gap"
        )


def private(holder: Any, name: str, library: str) -> Any:
    """Return what a private name holds, of a library as ``pip`` names it."""
    found = getattr(holder, name, _GONE)
    if found is _GONE:
        raise PrivateNameGoneError(holder, name, library)
    return found


def set_private(holder: Any, name: str, value: Any, library: str) -> None:
    """Give a private name, which there is, another value."""
    private(holder, name, library)
    setattr(holder, name, value)


def bound(holder: Any, name: str, library: str) -> Any:
    """Return a private function; where it is gone, one that says so once it is called, and not on import."""
    found = getattr(holder, name, _GONE)
    if found is not _GONE:
        return found

    def gone(*_: Any, **__: Any) -> Any:
        raise PrivateNameGoneError(holder, name, library)

    return gone
