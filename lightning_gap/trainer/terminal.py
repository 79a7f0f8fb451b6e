"""What callbacks say: tables and lines, once, on rank zero, in a terminal, a notebook or a log file."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

__all__ = ["quiet", "say"]


def say(*what: Any) -> None:
    """Print text, not broken into lines, or rich tables on rank zero.

    Tables fit the window, or 120 columns where there is none, as in a log file; there they have no colours either.
    What the output's encoding has no signs for becomes question marks: no run ends for the sake of a ‖.
    """
    # Not imported: what has no trainer answers at once.
    lightning = sys.modules.get("lightning.fabric.utilities.rank_zero")
    if lightning is not None and lightning.rank_zero_only.rank != 0:
        return
    console = Console(highlight=False)
    if not (console.is_terminal or console.is_jupyter):
        console = Console(highlight=False, width=120)
    for each in what:
        try:
            console.print(each, soft_wrap=isinstance(each, str), markup=False)
        except UnicodeEncodeError as error:
            with console.capture() as captured:
                console.print(each, soft_wrap=isinstance(each, str), markup=False)
            sys.stdout.write(captured.get().encode(error.encoding, "replace").decode(error.encoding))


@contextmanager
def quiet(level: int = logging.WARNING) -> Iterator[None]:
    """Keep Lightning's remarks on a run below a level, which nobody here can act on, from the user."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            for message in ("does not have many workers", "GPU available but not used", "LeafSpec"):
                warnings.filterwarnings("ignore", message=f".*{message}")
            for logger in loggers:
                logger.setLevel(level)
            yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)
