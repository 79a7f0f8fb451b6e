"""Schedulers that look at a metric, stepped when an epoch of the reference run is over."""

import math
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig

from lightning_gap.regime.counters import NEVER

__all__ = ["ReferencePlateaus"]


class ReferencePlateaus:
    """Steps ``ReduceLROnPlateau`` at the end of this run's epoch in which a reference epoch ends.

    Lightning itself would do so after a checkpoint is written, and not at all in the first epoch of a resumed run.

    Attributes:
        metrics: The latest values that they look at.
    """

    def __init__(self) -> None:
        self._configs: list[tuple[LRSchedulerConfig, int]] = []  # with the user's frequency
        self.metrics: dict[str, float] = {}

    def take(self, config: LRSchedulerConfig) -> None:
        """Take a scheduler out of Lightning's hands."""
        self._configs.append((config, config.frequency))
        config.interval, config.frequency = "step", NEVER

    def read(self, trainer: Trainer) -> None:
        """Keep what is looked at, for a checkpoint that is written now."""
        if self._configs:
            known = trainer.callback_metrics
            keys = [str(config.monitor) for config, _ in self._configs]
            self.metrics.update({key: float(known[key]) for key in keys if key in known})

    def step(self, trainer: Trainer, pl_module: LightningModule, before: int, now: int) -> None:
        """Step those that the reference run has stepped meanwhile."""
        self.read(trainer)
        for config, every in self._configs:
            if now // every == before // every:
                continue
            metric = self.metrics.get(str(config.monitor))
            if metric is None:
                missing = f"{type(config.scheduler).__name__} looks at {config.monitor}, which nothing has logged yet"
                if config.strict:
                    known = sorted(trainer.callback_metrics)
                    raise MisconfigurationException(f"{missing}. There are {known}: set monitor to one of these.")
                rank_zero_warn(f"{missing}; it is not stepped.")
            else:
                pl_module.lr_scheduler_step(cast(Any, config.scheduler), metric)

    def warn_of_late_metrics(self, trainer: Trainer) -> None:
        """Warn of a metric that came after it was looked at."""
        for config, _ in self._configs:
            used, now = self.metrics.get(str(config.monitor)), trainer.callback_metrics.get(str(config.monitor))
            if used is not None and now is not None and used != float(now) and not math.isnan(used):
                rank_zero_warn(
                    f"LargeBatchRegime: {type(config.scheduler).__name__} looks at {config.monitor} before "
                    "LightningModule.on_train_epoch_end logs it, so at the value of an epoch before. Log it in a step."
                )
