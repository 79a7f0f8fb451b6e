"""What callbacks say: tables and lines, once, on rank zero, in a terminal, a notebook or a log file."""

import sys
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console

__all__ = ["say"]


@rank_zero_only
def say(*what: Any) -> None:
    """Print text or tables on rank zero.

    Tables fit the window, or 120 columns where there is none, as in a log file; there they have no colours either.
    What the output's encoding has no signs for becomes question marks: no run ends for the sake of a ‖.

    Args:
        what: Strings, which are not broken into lines, and rich tables.

    Example:
        >>> say("two gaps")
        two gaps
    """
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
