"""``lightning-gap fit``, ``validate``, ``test`` and ``predict``: transport maps from configuration files."""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from lightning_gap.commands import TRAINER_COMMANDS
from lightning_gap.commands.parsing import CommandError
from lightning_gap.commands.saved_help import print_help

__all__ = ["add", "parsers", "require_jsonargparse", "run"]


def add(commands: Any) -> None:
    """Add the commands to a parser, for its help: their own options are LightningCLI's."""
    for name, what in TRAINER_COMMANDS.items():
        commands.add_parser(name, help=what, add_help=False)


def run(words: Sequence[str]) -> None:
    """Run one of the commands."""
    if find_spec("jsonargparse") is not None and list(words[1:]) in (["-h"], ["--help"]):
        print_help(words[0], lambda: _run(words))
    else:
        _run(words)


def _run(words: Sequence[str]) -> None:
    require_jsonargparse(words[0])
    from lightning_gap.commands.map_cli import run_trainer

    run_trainer(list(words))


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of the commands."""
    require_jsonargparse("completion")
    from lightning_gap.commands.map_cli import trainer_parsers

    return trainer_parsers()


def require_jsonargparse(command: str) -> None:
    """Raise ``CommandError`` where jsonargparse is missing."""
    try:
        import jsonargparse  # noqa: F401
    except ImportError:
        raise CommandError(f"{command} needs jsonargparse: pip install 'lightning_gap[cli]'") from None
