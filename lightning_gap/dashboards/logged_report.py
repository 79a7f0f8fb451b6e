"""The report of runs, logged as an artifact of a run."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning_gap.dashboards.comparison import compare
from lightning_gap.dashboards.report import render_html
from lightning_gap.dashboards.runs import read_runs
from lightning_gap.trainer.loggers import log_page

__all__ = ["log_report"]


def log_report(loggers: Iterable[Any], runs: Sequence[str | Path], *, name: str = "report") -> None:
    """Log the page that ``lightning-gap report`` writes of runs to loggers: beside the numbers that it is made of.

    W&B and Trackio get an artifact of the type ``report``, MLflow the artifact ``pages/NAME.html``, ``CSVLogger`` and
    ``TensorBoardLogger`` that file in their folder.

    Args:
        loggers: Of the run that gets it, as ``trainer.loggers``.
        runs: Folders of runs, or with runs in them, of any logger whose files can be read; such as the run's own.
        name: What the page is called.

    Raises:
        RunError: There is no run, or one cannot be read.

    Example:
        >>> from lightning_gap.dashboards.logged_report import log_report
        >>> log_report(trainer.loggers, ["logs"])  # doctest: +SKIP
    """
    page = render_html(compare(read_runs([Path(run) for run in runs])))
    with TemporaryDirectory() as folder:
        path = Path(folder, f"{name}.html")
        path.write_text(page, encoding="utf-8")
        log_page(loggers, name, path)
