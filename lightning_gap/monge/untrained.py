"""The fit of a map that has nothing to train: its start, a step of no effect, and the validation."""

from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning_gap.monge.module import MongeMap

__all__ = ["Untrained"]


class Untrained:
    """Stands in for parameters where a map has none: loops, schedulers and checkpoints want some."""

    def __init__(self) -> None:
        self._idle: nn.Parameter | None = None  # of no module, so that no state holds it

    def parameters(self, model: "MongeMap") -> list[nn.Parameter]:
        """Return a number of no effect for the optimizer."""
        self._idle = nn.Parameter(torch.zeros((), device=model.device))
        return [self._idle]

    def loss(self, loss: Tensor) -> Tensor:
        """Return the loss, differentiable in the number where there is nothing else."""
        return loss if self._idle is None or loss.requires_grad else loss + 0 * self._idle

    def end(self, trainer: Trainer) -> None:
        """Have the trainer validate and end after a step."""
        if self._idle is not None:
            trainer.should_stop = True
