"""How good a transport map is, as metrics that add up over batches and processes."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_gap.extras import library
from lightning_gap.monge.ot.checks import check_epsilon, check_pair, check_weights, solver_precision
from lightning_gap.monge.ot.costs import CostLike, resolve
from lightning_gap.monge.ot.divergence import sinkhorn_divergence
from lightning_gap.monge.ot.energy import energy_distance
from lightning_gap.monge.ot.epsilon import Epsilon, Scale
from lightning_gap.monge.ot.gap import Convention, check_convention, monge_gap
from lightning_gap.monge.ot.marginal import marginal_wasserstein
from lightning_gap.monge.ot.options import Solver, SolverOptions
from lightning_gap.precision import widest

__all__ = [
    "DisplacementCosine",
    "EnergyDistance",
    "MarginalWasserstein",
    "MongeGap",
    "SinkhornDivergence",
    "UnexplainedVariance",
    "pooled",
    "pooling_weights",
]


def pooling_weights(name: str, weights: Tensor | None, samples: Tensor, part_of: int | None = None) -> Tensor:
    """Return weights such that batches can be pooled: 1 a sample on average, so that a batch counts by its samples.

    Args:
        name: The caller's argument, for messages.
        weights: ``(n,)`` weights of a batch, summing to 1; uniform where ``None``. Samples of weight 0 do not count.
        samples: The ``(n, d)`` samples they belong to.
        part_of: Size of the batch where these are one process's part of it; the weights sum to 1 over all parts then.

    Raises:
        TypeError: The weights are no tensor.
        ValueError: Their shape, sign or sum is wrong.
    """
    if weights is None:
        return samples.new_ones(len(samples), dtype=widest(samples.device))
    given = weights.detach() if isinstance(weights, Tensor) else weights
    weights = check_weights(name, given, solver_precision(samples), balanced=part_of is None)
    return weights.to(widest(samples.device)) * ((weights > 0).sum() if part_of is None else part_of)


def pooled(weights: Tensor, like: Tensor) -> Tensor | None:
    """Return the weights of pooled batches, summing to 1; ``None`` where they are uniform.

    Args:
        weights: ``(n,)`` weights by :func:`pooling_weights`.
        like: Samples, whose dtype and device the result has.
    """
    if bool((weights == weights[0]).all()):
        return None
    return (weights / weights.sum()).to(solver_precision(like))


class _MapMetric(Metric):
    """A metric that draws itself."""

    full_state_update: bool = False

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Draw one or several values.

        Args:
            val: A value, or one for each step; :meth:`compute` by default.
            ax: Matplotlib axes to draw on; new ones by default.

        Returns:
            The figure and its axes.

        Raises:
            ModuleNotFoundError: Matplotlib is not installed.
        """
        library("matplotlib", f"{type(self).__name__}.plot()", "plots")
        return self._plot(val, ax)


class _SampleMetric(_MapMetric):
    """A metric of two sets of samples, all of which it keeps."""

    is_differentiable: bool = False
    # Names of the two sets, and of the states that keep them.
    _sets: ClassVar[tuple[str, str]]
    # Those of their weights: one for both sets where they are paired.
    _weights: ClassVar[tuple[str, ...]] = ("x_weights", "y_weights")
    _paired: ClassVar[bool] = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in (*self._sets, *self._weights):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def _check(self, first: Tensor, second: Tensor) -> None:
        check_pair(self._sets[0], first, self._sets[1], second, same_length=self._paired)

    def _keep(self, first: Tensor, second: Tensor, *weights: Tensor | None) -> None:
        self._check(first, second)
        for name, samples in zip(self._sets, (first, second), strict=True):
            kept = getattr(self, name)
            if kept and kept[0].shape[1] != samples.shape[1]:
                raise ValueError(
                    f"{name} has dimension {samples.shape[1]}, but {kept[0].shape[1]} in earlier updates: "
                    "use one metric for each space, or reset() between them"
                )
        names = ["weights"] if len(weights) == 1 else ["weights[0]", "weights[1]"]
        masses = [pooling_weights(*one) for one in zip(names, weights, (first, second), strict=False)]
        # Without their graphs, or an epoch of them would stay in memory.
        for name, samples in zip(self._sets, (first, second), strict=True):
            getattr(self, name).append(samples.detach())
        for name, mass in zip(self._weights, masses, strict=True):
            getattr(self, name).append(mass)

    def _kept(self) -> tuple[Tensor, Tensor]:
        first, second = (dim_zero_cat(getattr(self, name)) for name in self._sets)
        return first, second

    def _kept_weights(self) -> list[Tensor | None]:
        samples = dim_zero_cat(getattr(self, self._sets[0]))
        return [pooled(dim_zero_cat(getattr(self, name)), samples) for name in self._weights]


class _TransportMetric(_SampleMetric):
    """A metric of samples that solves optimal transport."""

    def __init__(
        self,
        cost: CostLike,
        *,
        epsilon: float | None,
        relative_epsilon: float,
        relative_to: Scale,
        reach: float | None,
        solver: Solver,
        tolerance: float,
        max_iterations: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        given = SolverOptions(solver, tolerance, max_iterations)
        rho = check_epsilon("rho", reach)
        Epsilon.given(given, epsilon, relative_epsilon, relative_to, rho=rho)
        self.cost = resolve(cost)
        self.options: dict[str, Any] = {
            "cost": self.cost,
            "epsilon": epsilon,
            "relative_epsilon": relative_epsilon,
            "relative_to": relative_to,
            "rho": rho,
            "solver": solver,
            "tolerance": tolerance,
            "max_iterations": max_iterations,
        }

    def _check(self, first: Tensor, second: Tensor) -> None:
        super()._check(first, second)
        self.cost.check_domain(self._sets[0], first)
        self.cost.check_domain(self._sets[1], second)


class MongeGap(_TransportMetric):
    r"""The Monge gap of a map over all pairs :math:`(x_i, T(x_i))` that it was given; see :func:`monge_gap`.

    .. math::
        \tfrac1n \sum_i c(x_i, T(x_i)) - W_{c,\varepsilon}(\rho_n, T\sharp\rho_n)

    (Uscidda and Cuturi 2023, equation 8.) The gap of many pairs is not the mean of the gaps of their batches, which is
    lower: all pairs are kept, and gathered from all processes. ``solver="exact"`` gives the gap without regularization,
    which is 0 for an optimal map.

    Values carry no gradient: train with :func:`monge_gap`.

    Args:
        cost: Ground cost: a name, an instance from :mod:`lightning_gap.costs`, or a function (one that can be pickled,
            if the metric is to be).
        epsilon: Regularization in units of the cost; overrides ``relative_epsilon``.
        relative_epsilon: Regularization as a share of the mean cost between all ``x`` and all ``mapped``.
        relative_to: ``"mean"``, or ``"std"`` for a share of the costs' standard deviation.
        convention: ``"shannon"`` (default), ``"kl"`` or ``"debiased"``.
        reach: Strength of soft marginals, in units of the cost; not with ``"shannon"``.
        solver: See :func:`optimal_transport`.
        tolerance: L1 marginal error at which the solver stops.
        max_iterations: Most sweeps of the solver.
        **kwargs: Of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: An option is not known or out of range.

    Example:
        >>> import torch
        >>> metric = MongeGap(solver="exact")
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> metric.update(x, 3 - x)  # crosses: |0 - 3|² and |1 - 2|² instead of twice |2|²
        >>> metric.compute()
        tensor(1.)
    """

    higher_is_better: bool = False
    _sets = ("x", "mapped")
    _weights = ("weights",)
    _paired = True
    x: list[Tensor]
    mapped: list[Tensor]
    weights: list[Tensor]

    def __init__(
        self,
        cost: CostLike = "sqeuclidean",
        *,
        epsilon: float | None = None,
        relative_epsilon: float = 0.01,
        relative_to: Scale = "mean",
        convention: Convention = "shannon",
        reach: float | None = None,
        solver: Solver = "auto",
        tolerance: float = 1e-3,
        max_iterations: int = 2000,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            cost,
            epsilon=epsilon,
            relative_epsilon=relative_epsilon,
            relative_to=relative_to,
            reach=reach,
            solver=solver,
            tolerance=tolerance,
            max_iterations=max_iterations,
            **kwargs,
        )
        check_convention(convention, reach)
        self.options["convention"] = convention

    def update(self, x: Tensor, mapped: Tensor, *, weights: Tensor | None = None) -> None:
        """Add pairs.

        Args:
            x: ``(n, d)`` samples.
            mapped: ``(n, d)`` images, row by row.
            weights: ``(n,)`` weights of the pairs, summing to 1; uniform by default. Batches count by their numbers of
                pairs.

        Raises:
            TypeError: An argument is no floating-point tensor, or the dtypes differ.
            ValueError: Shapes or devices do not fit, values are not finite, or the cost is not defined there.
        """
        self._keep(x, mapped, weights)

    def compute(self) -> Tensor:
        """Return the gap of all pairs, a scalar."""
        return monge_gap(*self._kept(), weights=self._kept_weights()[0], **self.options)


class SinkhornDivergence(_TransportMetric):
    r"""The Sinkhorn divergence between all samples of two kinds; see :func:`sinkhorn_divergence`.

    .. math::
        S_\varepsilon(\alpha, \beta) = OT_\varepsilon(\alpha, \beta)
            - \tfrac12 OT_\varepsilon(\alpha, \alpha) - \tfrac12 OT_\varepsilon(\beta, \beta)

    (Feydy et al. 2019, equation 3.) All samples are kept, and gathered from all processes: the divergence of many is
    not the mean of the divergences of their batches, which is higher.

    Values carry no gradient: train with :func:`sinkhorn_divergence`.

    Args:
        cost: Ground cost: a name, an instance from :mod:`lightning_gap.costs`, or a function.
        epsilon: Regularization in units of the cost; overrides ``relative_epsilon``.
        relative_epsilon: Regularization as a share of the mean cost between all ``x`` and all ``y``.
        relative_to: ``"mean"``, or ``"std"`` for a share of the costs' standard deviation.
        reach: Strength of soft marginals, in units of the cost; ``None`` for balanced transport.
        solver: See :func:`optimal_transport`; ``"exact"`` gives the transport cost itself.
        tolerance: L1 marginal error at which the solver stops.
        max_iterations: Most sweeps of the solver.
        **kwargs: Of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: An option is not known or out of range.

    Example:
        >>> import torch
        >>> metric = SinkhornDivergence(epsilon=0.01)
        >>> metric.update(torch.zeros(4, 1), torch.full((6, 1), 3.0))
        >>> metric.compute()
        tensor(9.)
    """

    higher_is_better: bool = False
    plot_lower_bound: float = 0.0
    _sets = ("x", "y")
    x: list[Tensor]
    y: list[Tensor]
    x_weights: list[Tensor]
    y_weights: list[Tensor]

    def __init__(
        self,
        cost: CostLike = "sqeuclidean",
        *,
        epsilon: float | None = None,
        relative_epsilon: float = 0.05,
        relative_to: Scale = "mean",
        reach: float | None = None,
        solver: Solver = "auto",
        tolerance: float = 1e-3,
        max_iterations: int = 2000,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            cost,
            epsilon=epsilon,
            relative_epsilon=relative_epsilon,
            relative_to=relative_to,
            reach=reach,
            solver=solver,
            tolerance=tolerance,
            max_iterations=max_iterations,
            **kwargs,
        )

    def update(self, x: Tensor, y: Tensor, *, weights: tuple[Tensor | None, Tensor | None] = (None, None)) -> None:
        """Add samples, which are not paired.

        Args:
            x: ``(n, d)`` samples.
            y: ``(m, d)`` samples.
            weights: ``(n,)`` and ``(m,)`` weights, each summing to 1; uniform by default. Batches count by their
                numbers of samples.

        Raises:
            TypeError: An argument is no floating-point tensor, or the dtypes differ.
            ValueError: Shapes or devices do not fit, values are not finite, or the cost is not defined there.
        """
        self._keep(x, y, *weights)

    def compute(self) -> Tensor:
        """Return the divergence between all samples, a scalar."""
        first, second = self._kept_weights()
        return sinkhorn_divergence(*self._kept(), weights=(first, second), **self.options)


class EnergyDistance(_SampleMetric):
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

    higher_is_better: bool = False
    plot_lower_bound: float = 0.0
    _sets = ("x", "y")
    x: list[Tensor]
    y: list[Tensor]
    x_weights: list[Tensor]
    y_weights: list[Tensor]

    def update(self, x: Tensor, y: Tensor, *, weights: tuple[Tensor | None, Tensor | None] = (None, None)) -> None:
        """Add samples, which are not paired.

        Args:
            x: ``(n, d)`` samples.
            y: ``(m, d)`` samples.
            weights: ``(n,)`` and ``(m,)`` weights, each summing to 1; uniform by default. Batches count by their
                numbers of samples.

        Raises:
            TypeError: An argument is no floating-point tensor, or the dtypes differ.
            ValueError: Shapes or devices do not fit, or values are not finite.
        """
        self._keep(x, y, *weights)

    def compute(self) -> Tensor:
        """Return the distance between all samples, a scalar."""
        first, second = self._kept_weights()
        return energy_distance(*self._kept(), weights=(first, second))


class MarginalWasserstein(_SampleMetric):
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

    higher_is_better: bool = False
    plot_lower_bound: float = 0.0
    _sets = ("x", "y")
    x: list[Tensor]
    y: list[Tensor]
    x_weights: list[Tensor]
    y_weights: list[Tensor]

    def __init__(self, reduction: Literal["none", "mean"] = "none", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if reduction not in ("none", "mean"):
            raise ValueError(f"reduction must be 'none' or 'mean', got {reduction!r}")
        self.reduction = reduction

    def update(self, x: Tensor, y: Tensor, *, weights: tuple[Tensor | None, Tensor | None] = (None, None)) -> None:
        """Add samples, which are not paired.

        Args:
            x: ``(n, d)`` samples.
            y: ``(m, d)`` samples.
            weights: ``(n,)`` and ``(m,)`` weights, each summing to 1; uniform by default. Batches count by their
                numbers of samples.

        Raises:
            TypeError: An argument is no floating-point tensor, or the dtypes differ.
            ValueError: Shapes or devices do not fit, or values are not finite.
        """
        self._keep(x, y, *weights)

    def compute(self) -> Tensor:
        """Return the distances between all samples, ``(d,)`` or their mean."""
        first, second = self._kept_weights()
        distances = marginal_wasserstein(*self._kept(), weights=(first, second))
        return distances.mean() if self.reduction == "mean" else distances


class UnexplainedVariance(_MapMetric):
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

    is_differentiable: bool = True
    higher_is_better: bool = False
    plot_lower_bound: float = 0.0
    squared_error: Tensor
    total: Tensor
    squares: Tensor
    count: Tensor
    mass: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("squared_error", torch.zeros(()), dist_reduce_fx="sum")
        # The sum of the true images: a vector from the first update on.
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("mass", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, mapped: Tensor, true_map: Tensor, *, weights: Tensor | None = None) -> None:
        """Add images.

        Args:
            mapped: ``(n, d)`` images under the map.
            true_map: ``(n, d)`` images of the same points under the true map.
            weights: ``(n,)`` weights of the points, summing to 1; uniform by default. Batches count by their numbers
                of points.

        Raises:
            TypeError: An argument is no floating-point tensor, or the dtypes differ.
            ValueError: Shapes or devices do not fit, or values are not finite.
        """
        check_pair("mapped", mapped, "true_map", true_map, same_length=True)
        w = pooling_weights("weights", weights, mapped)
        mapped, true_map = _wide(mapped), _wide(true_map)
        self.squared_error = self.squared_error + w @ (mapped - true_map).square().sum(1)
        self.total = self.total + w @ true_map
        self.squares = self.squares + w @ true_map.square().sum(1)
        self.count = self.count + len(mapped)
        self.mass = self.mass + w.sum()

    def compute(self) -> Tensor:
        """Return the percentage, a scalar.

        Raises:
            ValueError: All true images agree, so that there is no variance to explain.
        """
        variance = (self.squares - self.total.square().sum() / self.mass) / self.mass
        if not bool(variance > 0):
            raise ValueError(
                f"the variance of the {int(self.count)} true images is {variance.item():.3g}: "
                "UnexplainedVariance needs at least two that differ"
            )
        return (100 * self.squared_error / self.mass / variance).to(torch.get_default_dtype())


class DisplacementCosine(_MapMetric):
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

    is_differentiable: bool = True
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

    def update(self, x: Tensor, mapped: Tensor, true_map: Tensor, *, weights: Tensor | None = None) -> None:
        """Add points with both images.

        Args:
            x: ``(n, d)`` points.
            mapped: ``(n, d)`` images under the map.
            true_map: ``(n, d)`` images under the true map.
            weights: ``(n,)`` weights of the points, summing to 1; uniform by default. Batches count by their numbers
                of points.

        Raises:
            TypeError: An argument is no floating-point tensor, or the dtypes differ.
            ValueError: Shapes or devices do not fit, or values are not finite.
        """
        check_pair("x", x, "mapped", mapped, same_length=True)
        check_pair("x", x, "true_map", true_map, same_length=True)
        w = pooling_weights("weights", weights, x)
        moved, truly = _wide(mapped) - _wide(x), _wide(true_map) - _wide(x)
        self.products = self.products + w @ (moved * truly).sum(1)
        self.squares = self.squares + w @ moved.square().sum(1)
        self.true_squares = self.true_squares + w @ truly.square().sum(1)

    def compute(self) -> Tensor:
        """Return the cosine, a scalar."""
        norms = self.squares.sqrt() * self.true_squares.sqrt()
        cosine = self.products / norms if bool(norms > 0) else torch.zeros_like(norms)
        return cosine.to(torch.get_default_dtype())


def _wide(samples: Tensor) -> Tensor:
    """Return the samples in double where the device has it: sums of squares cancel."""
    return samples.to(widest(samples.device))
