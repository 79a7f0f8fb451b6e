"""How far a map is from the true map, where that is known."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_gap.checks import renamed
from lightning_gap.monge.ot.checks import check_pair
from lightning_gap.monge.scores.pooling import DrawnMetric, pooling_weights
from lightning_gap.precision import widest

__all__ = ["DisplacementCosine", "UnexplainedVariance", "displacement_cosine", "unexplained_variance"]


class _SumsMetric(DrawnMetric):
    """A metric of which only sums are kept."""

    is_differentiable: bool = True

    def add(self, sums: Mapping[str, Tensor | int]) -> None:
        """Add the sums of a batch to the states, which are vectors from the first update on where those are."""
        for name, value in sums.items():
            setattr(self, name, getattr(self, name) + value)


class UnexplainedVariance(_SumsMetric):
    r"""Unexplained variance percentage (L2-UVP) of a map whose true counterpart is known.

    .. math::
        100 \cdot \frac{E \|T(x) - T^*(x)\|^2}{\mathrm{Var}(\nu)}, \qquad
        \mathrm{Var}(\nu) = E \|T^*(x) - E\, T^*(x)\|^2

    0 for the true map, 100 for the constant map to the mean (Korotin et al. 2021, "Do neural optimal transport solvers
    work?", section 4). The variance is the total one of the true images that were given. Only sums are kept.

    Args:
        **kwargs: Of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = UnexplainedVariance()
        >>> true = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
        >>> metric.update(true + torch.tensor([0.1, 0.0]), true)
        >>> metric.compute()  # 100 · 0.1² / 1
        tensor(1.0000)
    """

    higher_is_better: bool = False
    plot_lower_bound: float = 0.0
    squared_error: Tensor
    total: Tensor
    squares: Tensor
    count: Tensor
    mass: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("squared_error", "total", "squares", "count", "mass"):
            dtype = torch.long if name == "count" else torch.get_default_dtype()
            self.add_state(name, torch.zeros((), dtype=dtype), dist_reduce_fx="sum")

    def update(
        self,
        mapped: Tensor,
        true_images: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        true_map: Tensor | None = None,
    ) -> None:
        """Add images.

        Args:
            mapped: ``(n, d)`` images under the map.
            true_images: ``(n, d)`` images of the same points under the true map.
            weights: ``(n,)`` weights of the points, summing to 1; uniform by default. Batches count by their numbers
                of points.
            true_map: Old name of ``true_images``.

        Raises:
            TypeError: An argument is no floating-point tensor, or the dtypes differ.
            ValueError: Shapes or devices do not fit, or values are not finite.
        """
        true = _given(true_images, true_map)
        self.add(_unexplained_variance_update(mapped, true, weights))

    def compute(self) -> Tensor:
        """Return the percentage, a scalar.

        Raises:
            ValueError: All true images agree, so that there is no variance to explain.
        """
        return _unexplained_variance_compute(self.squared_error, self.total, self.squares, self.count, self.mass)


class DisplacementCosine(_SumsMetric):
    r"""Cosine between the displacements of a map and of the true map, in :math:`L^2(\mu)`.

    .. math::
        \frac{\langle T - \mathrm{id},\, T^* - \mathrm{id} \rangle}{\|T - \mathrm{id}\|\, \|T^* - \mathrm{id}\|},
        \qquad \langle u, v \rangle = E\, \langle u(x), v(x) \rangle

    1 where all points move along the true displacements, however far (Korotin et al. 2021, section 4); 0 by convention
    where one of the maps moves nothing. Only sums are kept.

    Args:
        **kwargs: Of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = DisplacementCosine()
        >>> x = torch.zeros(2, 2)
        >>> metric.update(x, torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better: bool = True
    plot_lower_bound: float = -1.0
    plot_upper_bound: float = 1.0
    products: Tensor
    squares: Tensor
    true_squares: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("products", "squares", "true_squares"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")

    def update(
        self,
        x: Tensor,
        mapped: Tensor,
        true_images: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        true_map: Tensor | None = None,
    ) -> None:
        """Add points with both images.

        Args:
            x: ``(n, d)`` points.
            mapped: ``(n, d)`` images under the map.
            true_images: ``(n, d)`` images under the true map.
            weights: As of :class:`UnexplainedVariance`.
            true_map: Old name of ``true_images``.

        Raises:
            TypeError: An argument is no floating-point tensor, or the dtypes differ.
            ValueError: Shapes or devices do not fit, or values are not finite.
        """
        true = _given(true_images, true_map)
        self.add(_displacement_cosine_update(x, mapped, true, weights))

    def compute(self) -> Tensor:
        """Return the cosine, a scalar."""
        return _displacement_cosine_compute(self.products, self.squares, self.true_squares)


def unexplained_variance(mapped: Tensor, true_images: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Return the unexplained variance of a map in percent, a scalar; see :class:`UnexplainedVariance`.

    Args:
        mapped: ``(n, d)`` images under the map.
        true_images: ``(n, d)`` images of the same points under the true map.
        weights: ``(n,)`` weights of the points, summing to 1; uniform by default.

    Raises:
        TypeError: An argument is no floating-point tensor, or the dtypes differ.
        ValueError: Shapes or devices do not fit, values are not finite, or all true images agree.

    Example:
        >>> import torch
        >>> true = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
        >>> unexplained_variance(true.mean(0).expand(2, 2), true)
        tensor(100.)
    """
    return _unexplained_variance_compute(**_unexplained_variance_update(mapped, true_images, weights))


def displacement_cosine(x: Tensor, mapped: Tensor, true_images: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Return the cosine between the displacements of a map and of the true map; see :class:`DisplacementCosine`.

    Args:
        x: ``(n, d)`` points.
        mapped: ``(n, d)`` images under the map.
        true_images: ``(n, d)`` images under the true map.
        weights: ``(n,)`` weights of the points, summing to 1; uniform by default.

    Raises:
        TypeError: An argument is no floating-point tensor, or the dtypes differ.
        ValueError: Shapes or devices do not fit, or values are not finite.

    Example:
        >>> import torch
        >>> x = torch.zeros(2, 2)
        >>> displacement_cosine(x, x + 1, x + 3)
        tensor(1.)
    """
    return _displacement_cosine_compute(**_displacement_cosine_update(x, mapped, true_images, weights))


def _given(true_images: Tensor | None, true_map: Tensor | None) -> Tensor:
    true = renamed("true_map", "true_images", true_map, true_images)
    if true is None:
        raise TypeError("update() needs true_images, the images under the true map")
    return true


def _unexplained_variance_update(mapped: Tensor, true: Any, weights: Tensor | None) -> dict[str, Any]:
    """Return the sums of a batch."""
    check_pair("mapped", mapped, "true_images", true, same_length=True)
    w = pooling_weights("weights", weights, mapped)
    mapped, true = _wide(mapped), _wide(true)
    squared_error, squares = w @ (mapped - true).square().sum(1), w @ true.square().sum(1)
    return {"squared_error": squared_error, "total": w @ true, "squares": squares, "count": len(true), "mass": w.sum()}


def _unexplained_variance_compute(
    squared_error: Tensor, total: Tensor, squares: Tensor, count: Tensor | int, mass: Tensor
) -> Tensor:
    variance = (squares - total.square().sum() / mass) / mass
    if not bool(variance > 0):
        raise ValueError(
            f"the variance of the {int(count)} true images is {variance.item():.3g}: "
            "UnexplainedVariance needs at least two that differ"
        )
    return (100 * squared_error / mass / variance).to(torch.get_default_dtype())


def _displacement_cosine_update(x: Tensor, mapped: Tensor, true: Any, weights: Tensor | None) -> dict[str, Any]:
    """Return the sums of a batch."""
    check_pair("x", x, "mapped", mapped, same_length=True)
    check_pair("x", x, "true_images", true, same_length=True)
    w = pooling_weights("weights", weights, x)
    moved, truly = _wide(mapped) - _wide(x), _wide(true) - _wide(x)
    both = {"products": moved * truly, "squares": moved.square(), "true_squares": truly.square()}
    return {name: w @ value.sum(1) for name, value in both.items()}


def _displacement_cosine_compute(products: Tensor, squares: Tensor, true_squares: Tensor) -> Tensor:
    norms = squares.sqrt() * true_squares.sqrt()
    cosine = products / norms if bool(norms > 0) else torch.zeros_like(norms)
    return cosine.to(torch.get_default_dtype())


def _wide(samples: Tensor) -> Tensor:
    """Return the samples in double where the device has it: sums of squares cancel."""
    return samples.to(widest(samples.device))
