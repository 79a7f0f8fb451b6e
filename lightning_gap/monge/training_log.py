"""What a map tells of its training: to callbacks at each step, to loggers at one in ``log_every_n_steps``."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import WarningCache
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_gap.trainer.internals.of_lightning import updates_logs
from lightning_gap.trainer.loggers import define_axes, filled, log_at_update

__all__ = ["TrainingLog", "log_scores"]

_UPDATES = "lightning_gap/monge/updates"
_SINGLE = torch.float32.itemsize


class TrainingLog:
    """The values of the last training step, where ``LightningModule.log`` would put them, but much sooner."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}
        self._updates = 0
        self._unwritten = False
        self._said = WarningCache()

    def of_a_new_fit(self) -> None:
        """Forget the last step of an earlier fit."""
        self._unwritten = False

    def keep(self, module: LightningModule, values: Mapping[str, float | Tensor]) -> None:
        """Show callbacks the values of a step."""
        if self._unwritten and module.trainer.loggers:
            self._said.warn(
                f"{type(module).__name__} has an on_train_batch_end of its own, which hides that of MongeMap: loggers "
                "get no values of training; call super().on_train_batch_end(outputs, batch, batch_idx) in it."
            )
        self._unwritten, self._updates = True, module.global_step
        self._values = _named("train", module, values)
        for shown in (module.trainer.callback_metrics, module.trainer.logged_metrics):
            shown.update(self._values)

    def write(self, trainer: Any) -> None:
        """Give loggers the values, where their turn is."""
        self._unwritten = False
        made = trainer.global_step > self._updates  # of batches that are accumulated the last makes an update
        if made and self._values and trainer.loggers and updates_logs(trainer):
            define_axes(trainer.loggers, _UPDATES, self._values)
            numbers = {name: float(value) for name, value in self._values.items()}
            log_at_update(trainer, {**numbers, "epoch": trainer.current_epoch})
            for logger in trainer.loggers:
                logger.save()


def log_scores(module: LightningModule, stage: str, values: Mapping[str, Tensor]) -> None:
    """Log the scores of a validation or a test."""
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
