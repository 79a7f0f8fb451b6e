"""Distances between samples that solve no transport problem, as metrics."""

from typing import Any, Literal, get_args

from torch import Tensor

from lightning_gap.checks import check_choice
from lightning_gap.monge.ot.energy import energy_distance
from lightning_gap.monge.ot.marginal import marginal_wasserstein
from lightning_gap.monge.scores.pooling import TwoSampleMetric

__all__ = ["EnergyDistance", "MarginalWasserstein"]

Reduction = Literal["none", "mean"]


class EnergyDistance(TwoSampleMetric):
    r"""The energy distance between all samples of two kinds; see :func:`energy_distance`.

    .. math::
        2\, E\|X - Y\| - E\|X - X'\| - E\|Y - Y'\|

    over all pairs (Székely and Rizzo 2013): it has no parameter, and so compares across models and data. All samples
    are kept, and gathered from all processes.

    Values carry no gradient: train with :func:`energy_distance`.

    Args:
        **kwargs: Of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = EnergyDistance()
        >>> metric.update(torch.zeros(3, 1), torch.full((5, 1), 2.0))
        >>> metric.compute()
        tensor(4.)
    """

    def compute(self) -> Tensor:
        """Return the distance between all samples, a scalar."""
        first, second = self.kept_weights()
        return energy_distance(*self.kept(), weights=(first, second))


class MarginalWasserstein(TwoSampleMetric):
    r"""The Wasserstein-1 distance of each feature between all samples of two kinds; see :func:`marginal_wasserstein`.

    .. math::
        W_1(\alpha_k, \beta_k) = \int |F_k(t) - G_k(t)|\, dt

    (Vallender 1974.) Exact, by sorting, in the units of the features. All samples are kept, and gathered from all
    processes.

    Args:
        reduction: ``"none"`` for the ``(d,)`` distances of the features, ``"mean"`` for their mean.
        **kwargs: Of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: ``reduction`` is not known.

    Example:
        >>> import torch
        >>> metric = MarginalWasserstein()
        >>> metric.update(torch.zeros(3, 2), torch.tensor([[2.0, -1.0]]))
        >>> metric.compute()
        tensor([2., 1.])
    """

    def __init__(self, reduction: Reduction = "none", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_choice("reduction", reduction, get_args(Reduction))
        self.reduction = reduction

    def compute(self) -> Tensor:
        """Return the distances between all samples, ``(d,)`` or their mean."""
        first, second = self.kept_weights()
        distances = marginal_wasserstein(*self.kept(), weights=(first, second))
        return distances.mean() if self.reduction == "mean" else distances
