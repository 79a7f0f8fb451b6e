"""Faces of packages: one table of names, each imported when it is first used."""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, cast

__all__ = ["lazy"]


def lazy(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` of a package, by its ``__name__`` and ``__file__``.

    The table is what stands under ``if TYPE_CHECKING:`` in the package's ``__init__.py``, a line ``from home import
    name as name`` for each public name; so what readers and type checkers see is what there is.
    """
    homes = {}
    spec = sys.modules[package].__spec__
    # The loader reads from archives, too. Not parsed: that would take as long as the whole import.
    for line in cast(Any, spec).loader.get_data(file).decode().splitlines():
        if line.startswith("    from ") and " as " in line:
            _, home, _, name, _, _ = line.split()
            homes[name] = home

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if homes[name] == package:  # one of its own modules, which is no attribute before it is imported
            return import_module(f"{package}.{name}")
        return getattr(import_module(homes[name]), name)

    return get, lambda: sorted({*vars(sys.modules[package]), *homes}), sorted(homes)
