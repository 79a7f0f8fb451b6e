"""Runs read back from the files that loggers leave, one format a file."""

from lightning_gap.dashboards.runs.find import find_runs, read_runs
from lightning_gap.dashboards.runs.run import Run, RunError
from lightning_gap.dashboards.runs.wandb import wandb_records

__all__ = ["Run", "RunError", "find_runs", "read_runs", "wandb_records"]
