"""``lightning-gap completion``: the script by which a shell completes the command's words."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_gap.commands.parsing import CommandError
from lightning_gap.commands.trainer import parsers

__all__ = ["add"]

_SHELLS = ("bash", "zsh", "tcsh", "fish")


def add(commands: Any) -> None:
    """Add the command to a parser.

    Args:
        commands: What ``parser.add_subparsers`` returned.
    """
    completion = commands.add_parser(
        "completion",
        help="print the script for a shell's completion",
        description='Print a completion script. For bash: eval "$(lightning-gap completion bash)" in ~/.bashrc.',
    )
    completion.add_argument("shell", choices=_SHELLS, help="the shell")
    completion.set_defaults(run=_completion)


def _completion(options: argparse.Namespace) -> None:
    try:
        import shtab
    except ImportError:
        raise CommandError("shell completion needs shtab: pip install 'lightning_gap[cli]'") from None
    from lightning_gap.cli import parser

    if options.shell not in shtab.SUPPORTED_SHELLS:
        raise CommandError(f"this shtab knows no {options.shell}: pip install -U shtab")
    top = parser()
    _replace_commands(top, parsers())
    _complete_paths(top, shtab.FILE)
    print(shtab.complete(top, options.shell))


def _replace_commands(top: argparse.ArgumentParser, parsers: Mapping[str, argparse.ArgumentParser]) -> None:
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            action.choices.update(parsers)


def _complete_paths(parser: argparse.ArgumentParser, files: Any) -> None:
    """Let arguments that are paths be completed by files."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_paths(command, files)
        elif action.type is Path or action.dest in ("config", "ckpt_path", "data.source", "data.target"):
            action.complete = files  # type: ignore[attr-defined]
