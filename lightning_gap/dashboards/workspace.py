"""The W&B workspace as code: which metric is drawn against which, and the workspace made of that."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_gap.trainer.internals.of_others import workspace_model

__all__ = ["Panel", "WorkspaceError", "build_workspace", "panels", "save_workspace", "workspace_json"]

Part = Literal["large-batch", "monge"]
GroupBy = Literal["none", "reference", "batch"]

_REGIME, _DIFFUSION, _MONGE = (f"lightning_gap/{room}/" for room in ("regime", "diffusion", "monge"))
_STEP = "trainer/global_step"
_GROUPS = {
    "none": (),
    "reference": (f"{_REGIME}reference_batch_size",),
    "batch": (f"{_REGIME}reference_batch_size", f"{_REGIME}batch_size"),
}


class WorkspaceError(Exception):
    """A workspace that cannot be built or sent, said in one line with what to do."""


@dataclass(frozen=True)
class Panel:
    """One panel: lines over an axis, a dot a run, or images.

    Args:
        section: The heading it stands under.
        title: Its own.
        x: The metric of the abscissa, or for ``kind="scatter"`` the configuration's key; empty for images.
        y: The metrics drawn, or the images' keys.
        log_x: Whether the abscissa is logarithmic.
        log_y: Whether the ordinate is.
        kind: How it is drawn.
        difference: For lines: draw the second metric minus the first instead of both.
    """

    section: str
    title: str
    x: str
    y: tuple[str, ...]
    log_x: bool = False
    log_y: bool = False
    kind: Literal["lines", "scatter", "images"] = "lines"
    difference: bool = False


def panels(
    parts: Sequence[Part] = ("large-batch", "monge"),
    *,
    train_metric: str = "train_loss",
    val_metric: str = "val_loss",
) -> list[Panel]:
    """Return the panels of a workspace, as data.

    Args:
        parts: For which kinds of run.
        train_metric: What the user's own module logs on training data.
        val_metric: The same on held-out data.

    Example:
        >>> [panel.title for panel in panels(["monge"])][:2]
        ['Displacement', 'Loss']
    """
    found: list[Panel] = []
    if "large-batch" in parts:
        gap, path, rate = "Generalization gap", "Ultra-slow diffusion", "Learning rate and batch"
        t, updates = f"{_DIFFUSION}updates", f"{_REGIME}updates"
        batch = f"{_REGIME}batch_size"
        found += [
            Panel(gap, f"{val_metric} by batch size", batch, (val_metric,), log_x=True, kind="scatter"),
            Panel(gap, f"{val_metric} − {train_metric}", _STEP, (train_metric, val_metric), difference=True),
            Panel(gap, val_metric, _STEP, (val_metric,)),
            Panel(path, "‖wₜ − w₀‖ against log t", t, (f"{_DIFFUSION}distance",), log_x=True),
            Panel(path, "Relative distance", t, (f"{_DIFFUSION}relative_distance",), log_x=True),
            Panel(path, "Slope b by batch size", batch, (f"{_DIFFUSION}log_slope",), log_x=True, kind="scatter"),
            Panel(path, "Both laws", "", (f"{_DIFFUSION}figure",), kind="images"),
            Panel(rate, "Learning rate", updates, (f"{_REGIME}learning_rate",)),
            Panel(rate, "Learning rate over batch", updates, (f"{_REGIME}lr_over_batch",)),
            Panel(rate, "Samples seen", updates, (f"{_REGIME}samples_seen",)),
            Panel(
                rate, "Gradient noise scale", updates,
                (f"{_REGIME}noise_scale", f"{_REGIME}critical_batch_size"), log_y=True,
            ),
        ]  # fmt: skip
    if "monge" in parts:
        fit, updates = "Transport map", f"{_MONGE}updates"
        names = (
            ("displacement", "Displacement"), ("loss", "Loss"),
        )  # fmt: skip
        found += [
            Panel(fit, title, updates, (f"{_MONGE}train_{name}", f"{_MONGE}val_{name}"), log_y=False)
            for name, title in names
        ]
        found += [
            Panel(fit, title, updates, (f"{_MONGE}val_{name}", f"{_MONGE}val_{name}_floor"), log_y=True)
            for name, title in (
                ("energy_distance", "Energy distance"),
                ("wasserstein_1", "Marginal Wasserstein-1"),
                ("sinkhorn_divergence", "Sinkhorn divergence"),
            )
        ]
        found += [
            Panel(fit, "Monge gap", updates, (f"{_MONGE}val_monge_gap",), log_y=True),
        ]
        found.append(Panel(fit, "Map", "", (f"{_MONGE}map",), kind="images"))
    return found


def build_workspace(
    entity: str,
    project: str,
    *,
    name: str = "lightning_gap",
    parts: Sequence[Part] = ("large-batch", "monge"),
    train_metric: str = "train_loss",
    val_metric: str = "val_loss",
    group_by: GroupBy = "none",
) -> Any:
    """Build the workspace; nothing is sent.

    Args:
        entity: The W&B user or team.
        project: The W&B project.
        name: What the saved view is called.
        parts: For which kinds of run.
        train_metric: What the user's own module logs on training data.
        val_metric: The same on held-out data.
        group_by: Draw the mean of all runs with one reference batch, or also with one batch, or each run.

    Returns:
        A ``wandb_workspaces.workspaces.Workspace``.

    Raises:
        WorkspaceError: wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise WorkspaceError("the dashboard needs wandb-workspaces: pip install 'lightning_gap[wandb]'") from error

    def drawn(panel: Panel) -> Any:
        if panel.kind == "images":
            return wr.MediaBrowser(title=panel.title, media_keys=list(panel.y), num_columns=2)
        if panel.kind == "scatter":
            return wr.ScatterPlot(
                title=panel.title, x=wr.Config(panel.x), y=wr.SummaryMetric(panel.y[0]), log_x=panel.log_x
            )
        options: dict[str, Any] = {"title": panel.title, "x": panel.x, "y": list(panel.y), "log_x": panel.log_x}
        if panel.difference:
            options["custom_expressions"] = [" - ".join(f"${{{key}}}" for key in reversed(panel.y))]
        return wr.LinePlot(**options, log_y=panel.log_y, smoothing_factor=0)

    wanted = panels(parts, train_metric=train_metric, val_metric=val_metric)
    sections = [
        ws.Section(name=title, panels=[drawn(panel) for panel in wanted if panel.section == title], is_open=True)
        for title in dict.fromkeys(panel.section for panel in wanted)
    ]
    grouping = ws.RunsetSettings(groupby=[ws.Config(key) for key in _GROUPS[group_by]])
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, runset_settings=grouping)


def workspace_json(workspace: Any) -> str:
    """Return what would be sent to W&B, as indented JSON.

    Args:
        workspace: From :func:`build_workspace`.
    """
    sent = json.loads(workspace_model(workspace).model_dump_json(by_alias=True))
    return json.dumps(sent, indent=1, ensure_ascii=False) + "\n"


def save_workspace(workspace: Any) -> str:
    """Send the workspace to W&B and return its address.

    Args:
        workspace: From :func:`build_workspace`.

    Raises:
        WorkspaceError: W&B refuses: no key, no such project, no network.
    """
    try:
        workspace.save()
    except Exception as error:  # the client raises of its own, of requests, and of its transport
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WorkspaceError(
            f"W&B did not take the workspace: {reason}. Log in with `wandb login`, or write it with --offline FILE"
        ) from error
    return str(workspace.url)
