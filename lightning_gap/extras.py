"""Libraries that only some uses need: imported when they are needed, or named with what installs them."""

from importlib import import_module
from typing import Any

__all__ = ["library"]


def library(module: str, who: str, extra: str) -> Any:
    """Return an optional module.

    Args:
        module: Its full name.
        who: What needs it, for the message.
        extra: The extra of this package that brings it.

    Raises:
        ModuleNotFoundError: It is not installed; its ``name`` is that of the library.

    Example:
        >>> library("math", "arithmetic", "plots").pi > 3
        True
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        name = module.partition(".")[0]
        message = f"{who} needs {name}: pip install 'lightning_gap[{extra}]'"
        raise ModuleNotFoundError(message, name=name) from error
