"""The border between what ``torch.compile`` should trace and what it should call."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch

__all__ = ["eager"]

P = ParamSpec("P")
R = TypeVar("R")


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """Let compiled code call a function, and all that it calls, as they are: ``torch.compiler.disable`` with its types.

    For iterations whose number depends on the data, NumPy, checks of values, and loggers: Dynamo would trace them for
    minutes, and gain nothing. Not for functions with examples, which ``doctest`` would no longer find.
    """
    return cast("Callable[P, R]", torch.compiler.disable(function))
