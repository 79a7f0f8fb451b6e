"""A logger of Lightning's kind for Trackio, which has Weights & Biases' interface and one file a project."""

from argparse import Namespace
from collections.abc import Mapping
from io import BytesIO
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from lightning_gap.extras import library

__all__ = ["TrackioLogger"]


class TrackioLogger(Logger):
    """Logs a run to `Trackio <https://github.com/gradio-app/trackio>`_, on this machine or to a Space.

    Runs are in ``PROJECT.db`` under ``TRACKIO_DIR``, which ``trackio show`` and ``lightning-gap report`` read. Trackio
    keeps a run's configuration as it is at the first metric.

    Args:
        project: What the run belongs to.
        name: What it is called; Trackio makes one up by default.
        **options: Of ``trackio.init``, such as ``space_id``, ``group`` or ``resume``.

    Raises:
        ModuleNotFoundError: Trackio is not installed: ``pip install 'lightning_gap[trackio]'``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_gap.dashboards.trackio_logger import TrackioLogger
        >>> trainer = Trainer(logger=TrackioLogger("maps", name="first"))  # doctest: +SKIP
    """

    def __init__(self, project: str, name: str | None = None, **options: Any) -> None:
        super().__init__()
        library("trackio", "TrackioLogger", "trackio")
        self._project, self._name, self._options = project, name, options
        self._run: Any = None
        self._has_metrics = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Trackio's run, which begins when it is first asked for."""
        if self._run is None:
            trackio = library("trackio", "TrackioLogger", "trackio")
            self._run = trackio.init(project=self._project, name=self._name, **{"embed": False, **self._options})
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Put hyper-parameters into the run's configuration, flat.

        Args:
            params: Their names and values.
        """
        flat = _flat(vars(params) if isinstance(params, Namespace) else params)
        config = self.experiment.config
        if self._has_metrics and any(config.get(key) != value for key, value in flat.items()):
            rank_zero_warn(
                "Trackio keeps a run's configuration as it was at the first metric, so it does not get what comes "
                "later. Log to a new run to have it."
            )
        config.update(flat)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics in one row.

        Args:
            metrics: Their names and values.
            step: Which row of the run it is.
        """
        self._has_metrics = True
        self.experiment.log({key: float(value) for key, value in metrics.items()}, step=step)

    @rank_zero_only
    def log_picture(self, key: str, content: bytes, step: int) -> None:
        """Log a picture.

        Args:
            key: Its name.
            content: A PNG file.
            step: Which row of the run it is.
        """
        from PIL import Image

        trackio = library("trackio", "TrackioLogger", "trackio")
        self._has_metrics = True
        self.experiment.log({key: trackio.Image(Image.open(BytesIO(content)))}, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Leave the run open: a trainer that fits may test afterwards. Trackio ends it with the process."""

    @property
    def name(self) -> str:
        """The project."""
        return self._project

    @property
    def version(self) -> str | None:
        """The run's name."""
        return self._name if self._run is None else str(self._run.name)


def _flat(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return a mapping without mappings in it, of what JSON knows: keys are joined by slashes, all else is text."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}/")
        else:
            known = value is None or isinstance(value, str | int | float | bool)
            found[f"{prefix}{key}"] = value if known else str(value)
    return found
