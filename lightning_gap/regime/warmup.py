"""The first updates: a learning rate that grows from the reference run's, under whatever schedule runs."""

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_gap.regime.scaling import scaled

__all__ = ["Warmup", "warmup_factor"]


def warmup_factor(update: int, *, updates: int, factor: float) -> float:
    r"""Return what the reference run's learning rate is multiplied by at an update.

    .. math:: 1 + (f - 1) \, \min\left(1, \frac{t - 1}{K}\right)

    Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 2.2 (gradual warm-up).
    """
    return factor if update > updates else 1 + (factor - 1) * (update - 1) / updates


class Warmup:
    """Counts an optimizer's updates, and lets the first ones use less than its learning rate.

    The learning rate, scaled by ``factor`` already, is changed when the optimizer starts a step and given back when the
    step is over, so a scheduler never sees it, and any schedule may run below.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
        >>> warmup = Warmup(sgd, updates=3, factor=4.0)
        >>> for _ in range(5):
        ...     sgd.step()
        ...     print(round(warmup.learning_rate, 4), sgd.param_groups[0]["lr"])
        0.1 0.4
        0.2 0.4
        0.3 0.4
        0.4 0.4
        0.4 0.4
    """

    def __init__(self, optimizer: Optimizer, *, updates: int, factor: float) -> None:
        self.updates, self.factor, self.made = updates, factor, 0  # 0 updates are only counted
        self.optimizer = optimizer
        self._full: list[Any] | None = None
        self.rate: float | Tensor = math.nan  # of the first group, in the latest update; a tensor may wait for a device
        self._hooks = (
            optimizer.register_step_pre_hook(lambda *_: self._start()),
            optimizer.register_step_post_hook(lambda *_: self._end()),
        )

    @property
    def known(self) -> bool:
        """Whether the latest update had a learning rate that the optimizer's groups tell."""
        return isinstance(self.rate, Tensor) or not math.isnan(self.rate)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the first group, as used for the latest update."""
        return float(self.rate)

    def _start(self) -> None:
        groups = self.optimizer.param_groups
        if self.made < self.updates:
            share = warmup_factor(self.made + 1, updates=self.updates, factor=self.factor) / self.factor
            self._full = [group["lr"] for group in groups]
            for group, rate in zip(groups, self._full, strict=True):
                group["lr"] = scaled(rate, share)
        rate = groups[0].get("lr") if groups else math.nan  # Lightning's stand-in for no optimizer has none
        rate = math.nan if rate is None else rate  # of an optimizer that finds its own
        self.rate = rate.clone() if isinstance(rate, Tensor) else rate  # schedulers change a tensor in place

    def _end(self) -> None:
        self.give_back()
        self.made += 1

    def give_back(self) -> None:
        """Give the learning rates back that a step in progress, or one that failed, has taken."""
        if self._full is not None:
            for group, rate in zip(self.optimizer.param_groups, self._full, strict=False):
                group["lr"] = rate
            self._full = None

    def remove(self) -> None:
        """Let go of the optimizer."""
        self.give_back()
        for hook in self._hooks:
            hook.remove()
