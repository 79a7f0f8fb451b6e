"""Private names of argparse and of wandb_workspaces, a function each."""

import argparse
from collections.abc import Iterator
from typing import Any

from lightning_gap.trainer.internals.guard import private

__all__ = ["commands_of", "options_of", "workspace_model"]


def options_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the actions of a parser, but for the one that holds its commands."""
    commands = private(argparse, "_SubParsersAction", "python")
    yield from (action for action in private(parser, "_actions", "python") if not isinstance(action, commands))


def commands_of(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Return the parsers of a parser's commands by name, to be changed in place; without commands, nothing."""
    commands = private(argparse, "_SubParsersAction", "python")
    actions = private(parser, "_actions", "python")
    found: dict[str, Any] = next((action.choices for action in actions if isinstance(action, commands)), {})
    return found


def workspace_model(workspace: Any) -> Any:
    """Return the pydantic model that a W&B workspace sends."""
    return private(workspace, "_to_model", "wandb-workspaces")()
