"""The command ``lightning-gap``."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from lightning_gap import __version__
from lightning_gap.commands import COMMANDS, TRAINER_COMMANDS
from lightning_gap.commands.parsing import CommandError, Parser
from lightning_gap.commands.plan import names_config, names_runs, plan_config, plan_from
from lightning_gap.commands.trainer import run

__all__ = ["main", "parser"]


def parser() -> Parser:
    """Return the parser of all commands."""
    top = Parser(
        prog="lightning-gap", description="Close two gaps with PyTorch Lightning: large-batch training, and Monge maps."
    )
    top.add_argument("--version", action="version", version=f"lightning-gap {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name in COMMANDS:
        import_module(f"lightning_gap.commands.{name}").add(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``lightning-gap`` with these words, or those of the process.

    Raises:
        SystemExit: With status 2 and one line on stderr if the user asked for something that cannot be done.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words and words[0] in TRAINER_COMMANDS:
            run(words)
            return
        if words and words[0] == "plan" and names_config(words):
            plan_config(words[1:])
            return
        if words and words[0] == "plan" and names_runs(words):
            plan_from(words[1:])
            return
        options = parser().parse_args(words)
        options.words = words
        options.run(options)
    except CommandError as error:
        print(f"lightning-gap: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("lightning-gap: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader has gone, as in `lightning-gap plan ... | head`; Python would complain once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
