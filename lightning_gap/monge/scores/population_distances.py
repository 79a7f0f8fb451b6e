"""Distances between populations of cells, by the names and with the values of pertpy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lightning_gap.checks import check_integer, check_number
from lightning_gap.monge.ot.costs import Euclidean, SqEuclidean
from lightning_gap.monge.ot.energy import energy_distance
from lightning_gap.monge.ot.solve import optimal_transport
from lightning_gap.monge.ot.solvers.blocks import row_blocks

__all__ = ["DISTANCES", "check_distance", "perturbation_distance"]

Array = NDArray[np.float64]

# What keeps a constant feature from dividing by 0, as there.
_SPREAD = 1e-8
# The regularization that OTT-JAX takes by default: a share of the standard deviation of the cost.
_SHARE = 0.05
# Points of the grid along each axis on which densities are compared.
_GRID = 100


def perturbation_distance(x: Any, y: Any, metric: str = "edistance", **options: Any) -> float:
    r"""Return a distance between two populations of cells, named and defined as in pertpy's ``Distance``.

    With :math:`\bar x, \bar y` the means of the cells, :math:`x_k` feature :math:`k` of all cells, :math:`s` a standard
    deviation over :math:`n` or :math:`m` cells:

    =========================== ======================================================================================
    ``edistance``               :math:`2 E\|X - Y\| - E\|X - X'\| - E\|Y - Y'\|` over all pairs
    ``euclidean``               :math:`\|\bar x - \bar y\|_2`; ``root_mean_squared_error`` is another name of it there
    ``mse``                     :math:`\|\bar x - \bar y\|_2^2 / d`
    ``mean_absolute_error``     :math:`\|\bar x - \bar y\|_1 / d`
    ``pearson_distance``        1 − Pearson's correlation of the means, over the features
    ``spearman_distance``       1 − Spearman's
    ``kendalltau_distance``     :math:`(1 - \tau)\, d (d - 1) / 4`
    ``cosine_distance``         1 − the cosine of the means
    ``r2_distance``             :math:`\|\bar x - \bar y\|^2 / \sum_k (\bar x_k - \mathrm{mean}_l\, \bar x_l)^2`
    ``mean_pairwise``           :math:`E\|X - Y\|`
    ``mmd``                     squared discrepancy of the kernel, over all pairs: ``kernel="linear"`` (default),
                                ``"rbf"`` (:math:`e^{-\gamma\|x - y\|^2}`) or ``"poly"`` (:math:`(\gamma x^T y)^p`)
    ``wasserstein``             regularized cost of transport: squared Euclidean cost, :math:`\varepsilon` = 0.05
                                standard deviations of it over all pairs, with the KL term; no root is taken
    ``sym_kldiv``               mean over features of both Kullback-Leibler divergences of Gaussians, summed
    ``t_test``                  mean over features of Welch's :math:`|t|`
    ``ks_test``                 mean over features of the Kolmogorov-Smirnov statistic
    ``mean_var_distribution``   mean squared difference of two densities of (log mean, log variance) of the features
    ``mahalanobis``             distance of the means by the inverse covariance of ``x``
    =========================== ======================================================================================

    ``r2_distance`` and ``mahalanobis`` are not symmetric. Of pertpy's names ``classifier_proba`` (another value
    at each call there), ``classifier_cp`` (no distance of two sets) and ``nb_ll`` (the value of one optimizer) are
    refused.

    Args:
        x: ``(n, d)`` cells: a tensor, an array or a sparse matrix.
        y: ``(m, d)`` cells.
        metric: Name of the distance.
        **options: Of ``"mmd"``: ``kernel``, ``gamma`` (1) and ``degree`` (2). Of ``"wasserstein"``: ``tolerance``
            (1e-6), the L1 marginal error at which the solver stops; pertpy stops at 1e-3, in single precision.

    Returns:
        The distance, computed in double precision.

    Raises:
        TypeError: An option is not one of the metric.
        ValueError: The metric is not known, shapes do not fit, values are not finite, there are too few cells or
            features for it, or it has no value for these cells, as a correlation of means that are all the same.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
        >>> perturbation_distance(x, x + torch.tensor([3.0, 0.0, 4.0]), "euclidean")
        5.0
        >>> round(perturbation_distance(x, x + 1, "edistance"), 4)
        2.2202
    """
    check_distance(metric)
    first, second = _cells("x", x), _cells("y", y)
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"x has {first.shape[1]} features and y {second.shape[1]}: give the same ones of both")
    known = _OPTIONS.get(metric, ())
    for name in options:
        if name not in known:
            raise TypeError(f"metric={metric!r} has no option {name!r}; it has {', '.join(known) or 'none'}")
    # What has no value is refused below, whether numpy warns of it or not.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        distance = float(DISTANCES[metric](first, second, **options))
    if not np.isfinite(distance):
        why = _UNDEFINED.get(metric, "the values are too large for it")
        raise ValueError(
            f"metric={metric!r} of x and y is {distance}: {why}; take a metric that is defined, such as 'euclidean' or "
            "'edistance', or other features"
        )
    return distance


def check_distance(metric: Any) -> None:
    """Refuse what is no distance."""
    if metric in _REFUSED:
        raise ValueError(f"metric={metric!r} is not computed here: {_REFUSED[metric]}")
    if metric not in DISTANCES:
        raise ValueError(f"metric must be one of {', '.join(DISTANCES)}, got {metric!r}")


def _cells(name: str, cells: Any) -> Array:
    if isinstance(cells, Tensor):
        cells = cells.detach().cpu()
        # NumPy has no bfloat16.
        cells = (cells.double() if cells.is_floating_point() else cells).numpy()
    given: ArrayLike = cells.toarray() if hasattr(cells, "toarray") else cells
    array = np.asarray(given, dtype=np.float64)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{name} must have shape (n, d), with a cell and a feature at least, got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity: remove or fill it")
    return array


def _tensors(x: Array, y: Array) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(np.ascontiguousarray(y))


def _at_least(metric: str, what: str, found: int, least: int = 2) -> None:
    if found < least:
        raise ValueError(f"metric={metric!r} needs {least} {what} at least, got {found}")


def _means(x: Array, y: Array) -> tuple[Array, Array]:
    return x.mean(axis=0), y.mean(axis=0)


def _edistance(x: Array, y: Array) -> float:
    return float(energy_distance(*_tensors(x, y)))


def _euclidean(x: Array, y: Array) -> float:
    first, second = _means(x, y)
    return float(np.linalg.norm(first - second))


def _mse(x: Array, y: Array) -> float:
    first, second = _means(x, y)
    return float(np.square(first - second).mean())


def _mean_absolute_error(x: Array, y: Array) -> float:
    first, second = _means(x, y)
    return float(np.abs(first - second).mean())


def _pearson(x: Array, y: Array) -> float:
    _at_least("pearson_distance", "features", x.shape[1])
    return 1 - float(np.corrcoef(*_means(x, y))[0, 1])


def _spearman(x: Array, y: Array) -> float:
    # Imported here, and below: it takes a while, which only these should pay.
    from scipy.stats import rankdata

    _at_least("spearman_distance", "features", x.shape[1])
    first, second = _means(x, y)
    return 1 - float(np.corrcoef(rankdata(first), rankdata(second))[0, 1])


def _kendall(x: Array, y: Array) -> float:
    from scipy.stats import kendalltau

    d: int = x.shape[1]
    _at_least("kendalltau_distance", "features", d)
    return (1 - float(kendalltau(*_means(x, y)).statistic)) * d * (d - 1) / 4


def _cosine(x: Array, y: Array) -> float:
    first, second = _means(x, y)
    return 1 - float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))


def _r2(x: Array, y: Array) -> float:
    _at_least("r2_distance", "features", x.shape[1])
    first, second = _means(x, y)
    return float(np.square(first - second).sum() / np.square(first - first.mean()).sum())


def _mean_pairwise(x: Array, y: Array) -> float:
    a, b = _tensors(x, y)
    return sum(float(Euclidean().pairwise(a[rows], b).sum()) for rows in row_blocks(a, len(b))) / (len(a) * len(b))


def _mmd(x: Array, y: Array, *, kernel: str = "linear", gamma: float = 1.0, degree: int = 2) -> float:
    check_number("gamma", gamma, above=0)
    check_integer("degree", degree, 1)
    if kernel == "linear":  # all pairs' inner products average to that of the means
        return _mse(x, y) * int(x.shape[1])
    if kernel not in ("rbf", "poly"):
        raise ValueError(f"kernel must be 'linear', 'rbf' or 'poly', got {kernel!r}")

    def mean(a: Tensor, b: Tensor) -> float:
        total = 0.0
        for rows in row_blocks(a, len(b)):
            if kernel == "rbf":
                block = (-gamma * SqEuclidean().pairwise(a[rows], b)).exp()
            else:
                block = (gamma * (a[rows] @ b.T)) ** degree
            total += float(block.sum())
        return total / (len(a) * len(b))

    a, b = _tensors(x, y)
    return mean(a, a) + mean(b, b) - 2 * mean(a, b)


def _wasserstein(x: Array, y: Array, *, tolerance: float = 1e-6) -> float:
    check_number("tolerance", tolerance, above=0)
    a, b = _tensors(x, y)
    count, total, squares = len(a) * len(b), 0.0, 0.0
    mean = _mean_square(x, y)
    for rows in row_blocks(a, len(b)):
        from_mean = SqEuclidean().pairwise(a[rows], b) - mean
        total += float(from_mean.sum())
        squares += float(from_mean.square().sum())
    deviation = float(np.sqrt(max(squares / count - (total / count) ** 2, 0.0)))
    if deviation == 0:  # all pairs cost the same: there is nothing to choose
        return mean
    return float(optimal_transport(a, b, cost="sqeuclidean", epsilon=_SHARE * deviation, tolerance=tolerance).value)


def _mean_square(x: Array, y: Array) -> float:
    """Return the mean squared distance of all pairs."""
    first, second = _means(x, y)
    return float(np.square(first - second).sum() + x.var(axis=0).sum() + y.var(axis=0).sum())


def _sym_kldiv(x: Array, y: Array) -> float:
    between = np.square(x.mean(axis=0) - y.mean(axis=0))
    s, t = np.square(x.std(axis=0) + _SPREAD), np.square(y.std(axis=0) + _SPREAD)
    # The logarithms of both directions cancel.
    return float(((s + between) / (2 * t) + (t + between) / (2 * s) - 1).mean())


def _t_test(x: Array, y: Array) -> float:
    _at_least("t_test", "cells on each side", min(len(x), len(y)))
    variances = ((side.var(axis=0, ddof=1) + _SPREAD) / len(side) for side in (x, y))
    return float((np.abs(x.mean(axis=0) - y.mean(axis=0)) / np.sqrt(sum(variances))).mean())


def _ks_test(x: Array, y: Array) -> float:
    statistics = []
    for first, second in zip(np.sort(x, axis=0).T, np.sort(y, axis=0).T, strict=True):
        at = np.concatenate([first, second])
        shares = (np.searchsorted(side, at, side="right") / len(side) for side in (first, second))
        statistics.append(np.abs(next(shares) - next(shares)).max())
    return float(np.mean(statistics))


def _mean_var_distribution(x: Array, y: Array) -> float:
    sides = []
    for name, cells in (("x", x), ("y", y)):
        mean, variance = cells.mean(axis=0), cells.var(axis=0)
        kept = mean > 0
        if not kept.any() or (variance[kept] == 0).any():
            raise ValueError(
                "metric='mean_var_distribution' takes logarithms of means and variances over cells: "
                f"{name} needs features of positive mean, and none of them constant"
            )
        sides.append(np.log(np.stack([mean[kept], variance[kept]], axis=1)))
    axes = [_grid(np.concatenate([side[:, k] for side in sides])) for k in range(2)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    first, second = (_density(side, grid) for side in sides)
    return float(np.square(first - second).mean())


def _grid(values: Array) -> Array:
    step = (values.max() - values.min()) / (_GRID - 2)
    return np.asarray(values.min() - step / 2 + step * np.arange(_GRID))


def _density(points: Array, at: Array) -> Array:
    """Return a density estimate in the plane: exponential kernels of Silverman's width."""
    from scipy.spatial.distance import cdist

    width = len(points) ** (-1 / 6)
    return np.asarray(np.exp(-cdist(at, points) / width).mean(axis=1) / (2 * np.pi * width**2))


def _mahalanobis(x: Array, y: Array) -> float:
    _at_least("mahalanobis", "cells of x", len(x))
    first, second = _means(x, y)
    covariance = np.atleast_2d(np.cov(x.T))
    if np.linalg.matrix_rank(covariance) < x.shape[1]:
        raise ValueError(
            f"metric='mahalanobis' inverts the covariance of x, which {len(x)} cells and {x.shape[1]} features leave "
            "singular: take principal components, or leave constant features out"
        )
    return float(np.sqrt((first - second) @ np.linalg.solve(covariance, first - second)))


DISTANCES: dict[str, Callable[..., float]] = {
    "edistance": _edistance,
    "euclidean": _euclidean,
    "root_mean_squared_error": _euclidean,
    "mse": _mse,
    "mean_absolute_error": _mean_absolute_error,
    "pearson_distance": _pearson,
    "spearman_distance": _spearman,
    "kendalltau_distance": _kendall,
    "cosine_distance": _cosine,
    "r2_distance": _r2,
    "mean_pairwise": _mean_pairwise,
    "mmd": _mmd,
    "wasserstein": _wasserstein,
    "sym_kldiv": _sym_kldiv,
    "t_test": _t_test,
    "ks_test": _ks_test,
    "mean_var_distribution": _mean_var_distribution,
    "mahalanobis": _mahalanobis,
}
_SAME = "the means of x or of y are the same in all features"
# Where a distance has no value.
_UNDEFINED = {
    "pearson_distance": _SAME,
    "spearman_distance": _SAME,
    "kendalltau_distance": _SAME,
    "cosine_distance": "the means of x or of y are all 0",
    "r2_distance": "the means of x are the same in all features",
}
_OPTIONS = {"mmd": ("kernel", "gamma", "degree"), "wasserstein": ("tolerance",)}
_REFUSED = {
    "classifier_proba": "pertpy draws another fifth of the cells at each call, so its values are not reproducible",
    "classifier_cp": "it is no distance of two sets: train sklearn.linear_model.LogisticRegression on all groups",
    "nb_ll": "its values are those of statsmodels' optimizer: take pertpy for raw counts",
}
