"""The one file that knows loggers: x axes, facts, tables and figures, for whichever of Lightning's loggers there are.

Numbers go through ``pl_module.log`` or ``logger.log_metrics``, with the same keys everywhere.
"""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import fsspec
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor

from lightning_gap.trainer.internals.of_lightning import batches_that_stepped

__all__ = [
    "define_axes",
    "filled",
    "log_at_update",
    "log_facts",
    "log_figure",
    "log_now",
    "log_page",
    "log_table",
    "markdown",
    "takes_figures",
]

_KNOWN = ("WandbLogger", "TensorBoardLogger", "MLFlowLogger", "CSVLogger", "TrackioLogger")
_defined: "WeakKeyDictionary[Any, set[tuple[str, str]]]" = WeakKeyDictionary()


def _kind(logger: Any) -> str | None:
    """Return which of Lightning's loggers this is, or is derived from, in either of Lightning's two packages."""
    names = {cls.__name__ for cls in type(logger).__mro__}
    return next((kind for kind in _KNOWN if kind in names), None)


def filled(number: float | Tensor, device: torch.device) -> Tensor:
    """Return a number as ``pl_module.log`` would make a tensor of it, but without a copy that waits for the device."""
    if isinstance(number, Tensor):
        return number
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)  # Lightning keeps no half precision
    return torch.full((), number, dtype=dtype, device=device)


@rank_zero_only
def define_axes(loggers: Iterable[Any], x: str, names: Iterable[str]) -> None:
    """Let W&B draw metrics against ``x``, which is logged with them, instead of its step. Call it before each log.

    Exact names, since patterns lose to those of Lightning's own logger.
    """
    for logger in loggers:
        if _kind(logger) == "WandbLogger":
            known = _defined.setdefault(logger, set())
            new = [name for name in names if (x, name) not in known and name != x]
            if new and (x, x) not in known:
                logger.experiment.define_metric(x, hidden=True)
                known.add((x, x))
            for name in new:
                logger.experiment.define_metric(name, step_metric=x)
                known.add((x, name))


def log_at_update(trainer: Any, metrics: Mapping[str, float | Tensor]) -> None:
    """Log metrics, by their whole keys, at the step that ``pl_module.log`` would give them, and every one of them."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=batches_that_stepped(trainer))


def log_now(trainer: Any, device: torch.device, prefix: str, facts: Mapping[str, float | Tensor]) -> None:
    """Log metrics of an update at once, each against this package's own ``updates``, and keep them for callbacks.

    ``pl_module.log`` would take longer than all else that a callback does in an update, and repeat old values.
    """
    keyed = {f"{prefix}{name}": value for name, value in facts.items()}
    define_axes(trainer.loggers, f"{prefix}updates", keyed)
    log_at_update(trainer, keyed)
    trainer.callback_metrics.update({key: filled(value, device) for key, value in keyed.items()})


@rank_zero_only
def log_facts(loggers: Iterable[Any], prefix: str, facts: Mapping[str, Any]) -> None:
    """Log what was decided, as hyper-parameters."""
    keyed = {f"{prefix}{name}": value for name, value in facts.items()}
    for logger in loggers:
        logger.log_hyperparams(_new_to_mlflow(logger, keyed) if _kind(logger) == "MLFlowLogger" else keyed)


def _new_to_mlflow(logger: Any, facts: dict[str, Any]) -> dict[str, Any]:
    """Return what the run does not hold yet: MLflow ends a run that gives one of its parameters another value."""
    known = logger.experiment.get_run(logger.run_id).data.params
    kept = 250  # characters that Lightning's logger sends of a value
    if changed := sorted(key for key in facts if key in known and str(facts[key])[:kept] != known[key][:kept]):
        rank_zero_warn(
            f"MLflow keeps the parameters of a run as they were first logged, so it does not get what is now another "
            f"{', '.join(changed)}. Log to a new run to have these."
        )
    return {key: value for key, value in facts.items() if key not in known}


@rank_zero_only
def log_table(
    loggers: Iterable[Any], key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int = 0
) -> None:
    """Log a table: to W&B as one, to TensorBoard as text, to MLflow and CSV as the file ``tables/KEY.csv``."""
    for logger in loggers:
        kind = _kind(logger)
        if kind == "WandbLogger":
            logger.log_table(key, columns=list(columns), data=[list(row) for row in rows])
        elif kind == "TensorBoardLogger":
            logger.experiment.add_text(key, markdown(columns, rows), step)
        elif kind == "MLFlowLogger":
            logger.experiment.log_text(logger.run_id, _csv(columns, rows), f"tables/{key}.csv")
        elif kind == "CSVLogger":
            _write(logger, f"tables/{key}.csv", _csv(columns, rows).encode())


def takes_figures(logger: Any) -> bool:
    """Return whether :func:`log_figure` has a way to give a logger figures."""
    return _kind(logger) is not None


@rank_zero_only
def log_figure(loggers: Iterable[Any], key: str, draw: Callable[[], Any], step: int) -> None:
    """Log a figure: to W&B, TensorBoard and Trackio as an image, to MLflow and CSV as ``figures/KEY/STEP.png``.

    It is drawn once, and only if a logger takes it. Without matplotlib there are no figures.
    """
    takers = [logger for logger in loggers if takes_figures(logger)]
    if not takers:
        return
    try:
        figure = draw()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        return
    for logger in takers:
        kind = _kind(logger)
        if kind == "WandbLogger":
            logger.log_image(key, [figure], step)
        elif kind == "TensorBoardLogger":
            logger.experiment.add_figure(key, figure, step, close=False)
        elif kind == "MLFlowLogger":
            logger.experiment.log_figure(logger.run_id, figure, f"figures/{key}/{step:08d}.png")
        else:
            drawn = io.BytesIO()
            figure.savefig(drawn, format="png", dpi=110)
            if kind == "CSVLogger":
                _write(logger, f"figures/{key}/{step:08d}.png", drawn.getvalue())
            else:
                logger.log_picture(key, drawn.getvalue(), step)


@rank_zero_only
def log_page(loggers: Iterable[Any], name: str, path: Path) -> None:
    """Log a file as an artifact: to W&B and Trackio as one of their own, to MLflow and others' folders in ``pages``."""
    for logger in loggers:
        kind = _kind(logger)
        if kind == "WandbLogger":
            import wandb

            artifact = wandb.Artifact(name, type="report")
            artifact.add_file(str(path))
            logger.experiment.log_artifact(artifact)
        elif kind == "TrackioLogger":
            logger.experiment.log_artifact(path, name=name, type="report")
        elif kind == "MLFlowLogger":
            logger.experiment.log_artifact(logger.run_id, str(path), "pages")
        elif kind in ("CSVLogger", "TensorBoardLogger"):
            _write(logger, f"pages/{path.name}", path.read_bytes())
        else:
            rank_zero_warn(f"{type(logger).__name__} takes no files: {path.name} is not logged to it")


def _write(logger: Any, name: str, content: bytes) -> None:
    """Write a file into a logger's folder, which may be a remote one."""
    filesystem, path = fsspec.core.url_to_fs(f"{logger.log_dir}/{name}")
    filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
    with filesystem.open(path, "wb") as file:
        file.write(content)


def _csv(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue()


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table as Markdown, numbers to six digits.

    Example:
        >>> print(markdown(["t", "distance"], [[1, 0.25]]))
        | t | distance |
        | --- | --- |
        | 1 | 0.25 |
    """
    written = [[f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(columns), ["---"] * len(columns), *written])
