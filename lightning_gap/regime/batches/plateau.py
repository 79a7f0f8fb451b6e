"""Batches that grow where a metric stays."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_gap.checks import check_choice, check_integer, check_number
from lightning_gap.regime.batches.base import AdaptiveBatches, RateAt

__all__ = ["PlateauBatches"]


class PlateauBatches(AdaptiveBatches):
    """Batches that grow where a metric no longer gets better, in the place of a learning rate that falls there.

    When to grow is decided by torch's ``ReduceLROnPlateau``, with its arguments.

    Args:
        monitor: The metric's name.
        mode: ``"min"``, where less is better, or ``"max"``.
        factor: By what the batch grows, more than 1.
        patience: Validations without progress before the batch grows.
        threshold: The least relative progress that counts.
        cooldown: Validations after a growth that do not count.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> plateau = PlateauBatches(patience=0)
        >>> plateau.begin(128)
        >>> for loss in (1.0, 0.5, 0.5, 0.4):
        ...     plateau.observe({"val_loss": loss})
        ...     print(plateau.batch_at(0))
        128.0
        128.0
        256.0
        256.0
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        *,
        mode: str = "min",
        factor: float = 2.0,
        patience: int = 3,
        threshold: float = 1e-3,
        cooldown: int = 0,
    ) -> None:
        check_choice("mode", mode, ("min", "max"))
        check_number("factor", factor, above=1)
        check_integer("patience", patience, 0, "validations without progress")
        check_integer("cooldown", cooldown, 0, "validations that do not count")
        self.monitor, self.factor = monitor, float(factor)
        self._options: dict[str, Any] = {
            "mode": mode, "factor": 0.5, "patience": patience, "threshold": threshold, "cooldown": cooldown, "eps": 0.0,
        }  # fmt: skip
        self._detector = self._new()

    def _new(self) -> ReduceLROnPlateau:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        return ReduceLROnPlateau(optimizer, **self._options)

    @property
    def name(self) -> str:
        """What to call the schedule in tables."""
        return f"times {self.factor:g} where {self.monitor} stays"

    def begin(self, reference_batch_size: int, rate_at: RateAt | None = None) -> None:
        """Begin a run whose reference run has this batch.

        Args:
            reference_batch_size: Samples per update of the reference run.
            rate_at: Not asked.
        """
        super().begin(reference_batch_size)
        self._detector = self._new()

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Grow the batch if the metric has not got better for long enough.

        Args:
            metrics: What has been logged, by name.
        """
        if self.monitor not in metrics:
            raise ValueError(
                f"monitor={self.monitor!r} has not been logged by the end of a validation; there are "
                f"{sorted(metrics)}. Log it, or set monitor to one of these."
            )
        group = self._detector.optimizer.param_groups[0]
        group["lr"] = 1.0
        self._detector.step(float(metrics[self.monitor]))
        if group["lr"] < 1.0:
            self._ratio *= self.factor

    def state_dict(self) -> dict[str, Any]:
        """Return how far the batch has grown, and what has been seen."""
        seen = {key: getattr(self._detector, key) for key in ("best", "num_bad_epochs", "cooldown_counter")}
        return {"ratio": self._ratio, **{key: float(value) for key, value in seen.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint left.

        Args:
            state: What :meth:`state_dict` returned.
        """
        self._ratio = state["ratio"]
        self._detector.best = state["best"]
        self._detector.num_bad_epochs, self._detector.cooldown_counter = (
            int(state[key]) for key in ("num_bad_epochs", "cooldown_counter")
        )
