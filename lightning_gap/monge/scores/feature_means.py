"""How well the means of the features fit: their squared correlation, and the drug signature."""

from typing import Any

import torch
from torch import Tensor

from lightning_gap.monge.ot.checks import check_pair, check_weights, solver_precision
from lightning_gap.monge.scores.pooling import DrawnMetric, pooling_weights
from lightning_gap.precision import widest

__all__ = ["DrugSignature", "FeatureMeansR2", "drug_signature", "feature_means_r2"]

Weights = tuple[Tensor | None, Tensor | None]


def feature_means_r2(x: Tensor, y: Tensor, *, weights: Weights = (None, None)) -> Tensor:
    r"""Return the squared correlation of the features' means of two sets of samples.

    .. math::
        R^2 = \mathrm{corr}_k(\bar x_k, \bar y_k)^2

    over the features :math:`k` (Lotfollahi et al. 2019, "scGen"). It is 1 wherever the means agree, and also where they
    are scaled or shifted together; the means of untreated samples score high where few features change.

    Args:
        x: ``(n, d)`` samples, such as images.
        y: ``(m, d)`` samples.
        weights: ``(n,)`` and ``(m,)`` weights, each summing to 1; uniform by default.

    Returns:
        A scalar in [0, 1], NaN for fewer than two features or constant means.

    Raises:
        TypeError: An argument is no floating-point tensor, or the dtypes differ.
        ValueError: Shapes or devices do not fit, values are not finite, or weights do not sum to 1.

    Example:
        >>> import torch
        >>> feature_means_r2(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[1.0, 3.0, 5.0]]))
        tensor(1.)
    """
    return _r2(*_means(x, y, weights)).to(solver_precision(x[:1]).dtype)


def drug_signature(x: Tensor, y: Tensor, *, weights: Weights = (None, None)) -> Tensor:
    r"""Return the distance of the means of two sets of samples, :math:`\|\bar x - \bar y\|_2`.

    Of images and treated samples it is what a map misses of a drug's mean effect, its signature.

    Args:
        x: ``(n, d)`` samples, such as images.
        y: ``(m, d)`` samples.
        weights: ``(n,)`` and ``(m,)`` weights, each summing to 1; uniform by default.

    Returns:
        A scalar, in units of the features.

    Raises:
        TypeError: An argument is no floating-point tensor, or the dtypes differ.
        ValueError: Shapes or devices do not fit, values are not finite, or weights do not sum to 1.

    Example:
        >>> import torch
        >>> drug_signature(torch.zeros(2, 2), torch.tensor([[3.0, 4.0]]))
        tensor(5.)
    """
    first, second = _means(x, y, weights)
    distance: Tensor = (first - second).norm()
    return distance.to(solver_precision(x[:1]).dtype)


def _means(x: Tensor, y: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    check_pair("x", x, "y", y)
    first, second = (
        samples.to(widest(samples.device)).mean(0)
        if w is None
        else check_weights(f"weights[{k}]", w, samples).to(widest(samples.device)) @ samples.to(widest(samples.device))
        for k, (samples, w) in enumerate(zip((x, y), weights, strict=True))
    )
    return first, second


def _r2(first: Tensor, second: Tensor) -> Tensor:
    first, second = first - first.mean(), second - second.mean()
    return (first @ second).square() / (first.square().sum() * second.square().sum())


class _MeansMetric(DrawnMetric):
    """A metric of the means of two sets of samples, of which it keeps the sums."""

    is_differentiable: bool = True
    x_sum: Tensor
    y_sum: Tensor
    x_mass: Tensor
    y_mass: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("x_sum", "y_sum", "x_mass", "y_mass"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")

    def update(self, x: Tensor, y: Tensor, *, weights: Weights = (None, None)) -> None:
        """Add samples, which are not paired.

        Args:
            x: ``(n, d)`` samples.
            y: ``(m, d)`` samples.
            weights: Of both, each summing to 1; uniform by default. Batches count by their numbers of samples.
        """
        check_pair("x", x, "y", y)
        if self.x_sum.dim() and self.x_sum.shape != x.shape[1:]:
            raise ValueError(
                f"x has dimension {x.shape[1]}, but {len(self.x_sum)} in earlier updates: use one metric for each "
                "space, or reset() between them"
            )
        new = {
            name: (pooling_weights(f"weights[{k}]", weights[k], samples), samples.detach())
            for k, (name, samples) in enumerate((("x", x), ("y", y)))
        }
        for name, (mass, samples) in new.items():
            setattr(self, f"{name}_sum", getattr(self, f"{name}_sum") + mass @ samples.to(mass.dtype))
            setattr(self, f"{name}_mass", getattr(self, f"{name}_mass") + mass.sum())

    def means(self) -> tuple[Tensor, Tensor]:
        """Return the means of all samples of both sets."""
        return self.x_sum / self.x_mass, self.y_sum / self.y_mass


class FeatureMeansR2(_MeansMetric):
    """The squared correlation of the features' means; see :func:`feature_means_r2`. Only sums are kept.

    Args:
        **kwargs: Of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = FeatureMeansR2()
        >>> metric.update(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[1.0, 3.0, 5.0]]))
        >>> float(metric.compute())
        1.0
    """

    higher_is_better: bool = True
    plot_lower_bound: float = 0.0
    plot_upper_bound: float = 1.0

    def compute(self) -> Tensor:
        """Return the squared correlation, a scalar."""
        return _r2(*self.means())


class DrugSignature(_MeansMetric):
    """The distance of the means; see :func:`drug_signature`. Only sums are kept.

    Args:
        **kwargs: Of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = DrugSignature()
        >>> metric.update(torch.zeros(2, 2), torch.tensor([[3.0, 4.0]]))
        >>> float(metric.compute())
        5.0
    """

    higher_is_better: bool = False
    plot_lower_bound: float = 0.0

    def compute(self) -> Tensor:
        """Return the distance, a scalar."""
        first, second = self.means()
        distance: Tensor = (first - second).norm()
        return distance
