"""``lightning-gap dashboard``: the W&B workspace, built from code."""

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_gap.commands.parsing import CommandError, write_text

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command to a parser."""
    dashboard = commands.add_parser(
        "dashboard",
        help="build the W&B workspace of this package's metrics",
        description="Build a W&B workspace with panels for the generalization gap by batch size, the distance from "
        "the initial weights against log t, learning rate and batch, the gradient noise scale, and transport maps. "
        "It is saved to W&B, or written as the JSON that would be sent.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    # Without the library that is the first thing to say, not which options it would need.
    installed = find_spec("wandb_workspaces") is not None
    dashboard.add_argument("--entity", required=installed, help="the W&B user or team")
    dashboard.add_argument("--project", required=installed, help="the W&B project")
    dashboard.add_argument("--name", default="lightning_gap", help="what the view is called")
    dashboard.add_argument(
        "--part", choices=("large-batch", "monge"), action="append", default=argparse.SUPPRESS,
        help="panels of this kind of run only; may be repeated (default: both)",
    )  # fmt: skip
    dashboard.add_argument("--train-metric", default="train_loss", metavar="KEY", help="what your module logs on "
                           "training data")  # fmt: skip
    dashboard.add_argument("--val-metric", default="val_loss", metavar="KEY", help="the same on held-out data")
    dashboard.add_argument(
        "--group-by", choices=("none", "reference", "batch"), default="none",
        help="draw each run, or the mean of the runs of one reference batch, or of one reference batch and batch",
    )  # fmt: skip
    dashboard.add_argument(
        "--offline", type=Path, metavar="FILE", default=argparse.SUPPRESS,
        help="write the JSON that would be sent to this file, and send nothing",
    )  # fmt: skip
    dashboard.set_defaults(run=_dashboard)


def _dashboard(options: argparse.Namespace) -> None:
    from lightning_gap.dashboards.workspace import WorkspaceError, build_workspace, save_workspace, workspace_json

    if find_spec("wandb_workspaces") is None:
        raise CommandError("the dashboard needs wandb-workspaces: pip install 'lightning_gap[wandb]'")
    for option in ("entity", "project", "name", "train_metric", "val_metric"):
        if not getattr(options, option).strip():
            raise CommandError(f"--{option.replace('_', '-')} is empty: name one")
    try:
        workspace = build_workspace(
            options.entity,
            options.project,
            name=options.name,
            parts=tuple(dict.fromkeys(getattr(options, "part", ("large-batch", "monge")))),
            train_metric=options.train_metric,
            val_metric=options.val_metric,
            group_by=options.group_by,
        )
        if not hasattr(options, "offline"):
            print(f"Workspace: {save_workspace(workspace)}")
            return
        text = workspace_json(workspace)
    except WorkspaceError as error:
        raise CommandError(str(error)) from None
    write_text("--offline", options.offline, text)
    print(f"Written to {options.offline}; nothing was sent.")
