"""What a map tells of its training: to callbacks at each step, to loggers at one in ``log_every_n_steps``."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_gap.trainer.loggers import define_axes, filled, log_at_update

__all__ = ["TrainingLog", "log_scores"]

_UPDATES = "lightning_gap/monge/updates"
_SINGLE = torch.float32.itemsize


class TrainingLog:
    """The values of the last training step.

    They are where ``LightningModule.log`` would put them, which would take a fifth of a step of 256 samples: it
    describes each value anew, and moves what it knows of it to its device.
    """

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}
        self._updates = 0

    def keep(self, module: LightningModule, values: Mapping[str, float | Tensor]) -> None:
        """Show callbacks the values of a step.

        Args:
            module: The module, in its training step.
            values: By name.
        """
        self._updates = module.global_step
        self._values = _named("train", module, values)
        for shown in (module.trainer.callback_metrics, module.trainer.logged_metrics):
            shown.update(self._values)

    def write(self, trainer: Any) -> None:
        """Give loggers the values, where their turn is.

        Args:
            trainer: The trainer, at the end of a training batch.
        """
        done, every = trainer.global_step, trainer.log_every_n_steps
        if done == self._updates or not (every and trainer.loggers and self._values):  # batches may be accumulated
            return
        if done % every == 0 or trainer.should_stop:
            define_axes(trainer.loggers, _UPDATES, self._values)
            numbers = {name: float(value) for name, value in self._values.items()}
            log_at_update(trainer, {**numbers, "epoch": trainer.current_epoch})
            for logger in trainer.loggers:
                logger.save()


def log_scores(module: LightningModule, stage: str, values: Mapping[str, Tensor]) -> None:
    """Log the scores of a validation or a test.

    Args:
        module: The module, at the end of the stage's epoch.
        stage: ``"val"`` or ``"test"``.
        values: By name.
    """
    named = _named(stage, module, values)
    define_axes(module.trainer.loggers, _UPDATES, named)
    options: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True}
    # Of an epoch's updates the last, not their mean.
    module.log(_UPDATES, named.pop(_UPDATES), reduce_fx="max", **options)
    module.log_dict(named, **options)


def _named(stage: str, module: LightningModule, values: Mapping[str, float | Tensor]) -> dict[str, Tensor]:
    """Return the values by the names under which they are logged, and the updates so far."""
    named = {f"lightning_gap/monge/{stage}_{name}": value for name, value in values.items()}
    named[_UPDATES] = float(module.global_step)
    found = {name: filled(value, module.device).detach() for name, value in named.items()}
    return {name: value.float() if value.dtype.itemsize < _SINGLE else value for name, value in found.items()}
