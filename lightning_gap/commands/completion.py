"""``lightning-gap completion``: the script by which a shell completes the command's words."""

import argparse
from pathlib import Path
from typing import Any

from lightning_gap.commands.parsing import CommandError
from lightning_gap.commands.trainer import parsers
from lightning_gap.trainer.internals.of_others import commands_of, options_of

__all__ = ["add"]

_SHELLS = ("bash", "zsh", "tcsh", "fish")


def add(commands: Any) -> None:
    """Add the command to a parser."""
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
    commands_of(top).update(parsers())
    _complete_paths(top, shtab.FILE)
    print(shtab.complete(top, options.shell))


def _complete_paths(parser: argparse.ArgumentParser, files: Any) -> None:
    """Let arguments that are paths be completed by files."""
    for command in commands_of(parser).values():
        _complete_paths(command, files)
    for option in options_of(parser):
        if option.type is Path or option.dest in ("config", "ckpt_path", "data.source", "data.target"):
            option.complete = files  # type: ignore[attr-defined]
