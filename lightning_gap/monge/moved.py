"""Modules of older versions, by whose names configuration files, pickles and imports know what is in the face now."""

import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any

__all__ = ["answer_for"]

_FACE = "lightning_gap.monge"
_OLD = (
    "batches", "brenier", "conditional", "conservativity", "data", "energy", "gap", "gaussian", "marginal", "metrics",
    "minibatch_energy", "networks", "representation", "sinkhorn", "sphere", "structured",
)  # fmt: skip


class _Moved(ModuleType):
    def __getattr__(self, name: str) -> Any:
        face = import_module(_FACE)
        if name.startswith("_") or name not in face.__all__:
            raise AttributeError(f"module {self.__name__!r} has moved, and {_FACE} has no {name!r}")
        warnings.warn(f"{self.__name__}.{name} is {_FACE}.{name} now", DeprecationWarning, stacklevel=2)
        return getattr(face, name)


def answer_for() -> None:
    """Let imports of the old modules find the face's names."""
    for name in _OLD:
        sys.modules.setdefault(f"{_FACE}.{name}", _Moved(f"{_FACE}.{name}"))
