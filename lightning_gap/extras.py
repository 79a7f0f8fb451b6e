"""Libraries that only some uses need: imported when they are needed, or named with what installs them."""

from importlib import import_module
from typing import Any

__all__ = ["library"]


def library(module: str, who: str, extra: str) -> Any:
    """Return an optional module; raise what says who needs it, and which extra of this package brings it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        name = module.partition(".")[0]
        message = f"{who} needs {name}: pip install 'lightning_gap[{extra}]'"
        raise ModuleNotFoundError(message, name=name) from error
