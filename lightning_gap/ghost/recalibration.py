"""When a fit takes statistics anew, and for which weights: its own, or their moving average."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, cast

from lightning.pytorch import Callback, Trainer

from lightning_gap.ghost.layers import GhostNorm
from lightning_gap.ghost.recalibrate import recalibrate_in_training
from lightning_gap.trainer.internals.of_lightning import average_in_place, averaged_model

__all__ = ["Recalibration"]


class Recalibration:
    """The statistics of a fit, taken anew where the weights have changed since.

    Under a ``WeightAveraging`` callback validation, checkpoints and the end of a fit have the average in the place of
    the weights, so its statistics are taken: those of the weights that were averaged, averaged, are not those of the
    average.

    Args:
        ours: The callback that asks, whose place among the others says whether the average has been copied at the end.
        batches: Training batches to average over; ``None`` for never.
    """

    def __init__(self, ours: Callback, batches: int | None) -> None:
        self._ours, self._batches = ours, batches
        self._trained: list[GhostNorm] = []  # those whose statistics the last batch has changed
        self._layers: list[GhostNorm] = []  # those that an average is asked for
        self._averaged: int | None = None  # updates of the average when its statistics were taken

    def note(self, layers: Iterable[GhostNorm]) -> None:
        """Remember which layers a batch has changed: frozen ones are in evaluation mode."""
        if self._batches is not None:
            self._trained = [layer for layer in layers if layer.training and layer.track_running_stats]

    def take(self, trainer: Trainer, *, ends: bool = False) -> None:
        """Take the statistics of what is validated, saved or left behind now, if it has changed. Collective."""
        layers, self._trained = [layer for layer in self._trained if layer.running_mean is not None], []
        if self._batches is None:
            return
        callbacks: list[Any] = cast(Any, trainer).callbacks
        averaging = next((each for each in callbacks if averaged_model(each) is not None), None)
        if averaging is None:
            if layers:
                recalibrate_in_training(trainer, layers, self._batches)
            return
        self._layers = layers or self._layers
        updates = int(averaged_model(averaging).n_averaged)
        if not self._layers or updates == self._averaged:
            return
        self._averaged = updates
        copied = ends and callbacks.index(averaging) < callbacks.index(self._ours)
        with nullcontext() if copied else average_in_place(averaging, trainer.lightning_module):
            recalibrate_in_training(trainer, self._layers, self._batches)
