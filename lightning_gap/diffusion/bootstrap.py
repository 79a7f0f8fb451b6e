"""Confidence in a least-squares fit whose residuals are correlated and grow with the curve, as those of a walk do."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter
from scipy.special import ndtri, stdtrit

__all__ = ["Model", "autocorrelation", "bootstrap", "effective_points"]

Vector = NDArray[np.float64]
# Parameters (R, 2) and abscissae (n,) -> values (R, n) and their derivatives by both parameters, (R, n) each.
Model = Callable[[Vector, Vector], tuple[Vector, Vector, Vector]]

_BLOCK = 2
_BURN_IN = 100
_LARGEST_AUTOCORRELATION = 0.97
# Beyond so many points the autocorrelation's bias is under one percent, and the matrix that removes it is large.
_MOST_POINTS_CORRECTED = 1000
_NUMBERS_AT_ONCE = 1 << 22


def bootstrap(
    model: Model, parameters: Vector, x: Vector, y: Vector, *, resamples: int, confidence: float, growing: bool = True
) -> Vector:
    r"""Return parameters of ``resamples`` curves that could have been measured instead of this one: (R, 2).

    A prewhitened block bootstrap. Residuals are divided by their scale, which grows as a power of the curve; a
    first-order autoregression is taken out of them; blocks of its innovations are drawn, with replacement; and the
    autoregression and the scale are put back. Each new curve is fitted by Gauss-Newton steps from the old parameters.
    Deviations are widened by Student's t at the effective number of points, for quantiles at ``confidence``.

    Plain blocks of residuals would have to be longer than their correlation, and then only a handful of independent
    blocks fit into the hundred points of a curve; intervals come out too short.
    """
    fitted, *gradient = (row[0] for row in model(parameters[None], x))
    residuals = y - fitted
    if not np.abs(residuals).max() > 1e-12 * np.abs(y).max():
        return np.repeat(parameters[None], resamples, 0)
    scale = _scale(residuals, fitted) if growing else np.ones_like(fitted)
    white, design = residuals / scale, np.stack(gradient, 1) / scale[:, None]
    rho = autocorrelation(white, design)
    innovations = white[1:] - rho * white[:-1]
    n = len(innovations)
    innovations = (innovations - innovations.mean()) * math.sqrt((n + 1) / max(n - 2, 1))
    drawn = _draws(innovations, rho, resamples, len(x))
    replicates = np.concatenate([_refit(model, parameters, x, fitted + scale * part) for part in drawn])
    upper = (1 + confidence) / 2
    widening = stdtrit(max(effective_points(len(x), rho) - 2, 2.0), upper) / ndtri(upper)
    return np.asarray(parameters + widening * (replicates - parameters))


def effective_points(points: int, rho: float) -> float:
    """Return how many independent points are worth ``points`` of a first-order autoregression."""
    return points * (1 - rho) / (1 + rho)


def autocorrelation(residuals: Vector, design: Vector) -> float:
    """Return the lag-one autocorrelation of the errors behind least-squares residuals, between 0 and 0.97.

    Residuals look less correlated than errors. For errors of covariance Σ_ρ and residuals M·error the expected
    autocorrelation is tr(M A M Σ_ρ) / tr(M Σ_ρ), where A shifts by one; ρ is found at which this is the one observed.
    """
    n = len(residuals)
    observed = float(residuals[1:] @ residuals[:-1] / (residuals @ residuals))
    rho = np.linspace(0, _LARGEST_AUTOCORRELATION, 98)
    if n <= _MOST_POINTS_CORRECTED:
        basis = np.linalg.qr(design)[0]
        projection = np.eye(n) - basis @ basis.T
        lags = np.abs(np.arange(n)[:, None] - np.arange(n)).ravel()
        powers = rho[:, None] ** np.arange(n)
        shifted, unshifted = (
            powers @ np.bincount(lags, weights=matrix.ravel())
            for matrix in (projection[1:].T @ projection[:-1], projection)
        )
        return float(np.interp(observed, shifted / unshifted, rho))
    return min(max(observed, 0.0), _LARGEST_AUTOCORRELATION)


def _scale(residuals: Vector, fitted: Vector) -> Vector:
    """The residuals' scale as a power between 0 and 1.5 of the curve, by regression of their logarithms."""
    curve = np.maximum(fitted, 0.02 * fitted.max())
    if not curve.min() > 0:
        return np.ones_like(fitted)
    x = np.log(curve) - np.log(curve).mean()
    spread = x @ x
    power = x @ np.log(np.abs(residuals) + 1e-300) / spread if spread > 0 else 0.0
    return np.asarray(curve ** min(max(power, 0.0), 1.5))


def _draws(innovations: Vector, rho: float, resamples: int, length: int) -> list[Vector]:
    """Autoregressions driven by blocks of the innovations, (R, length) in parts that fit into memory."""
    generator = np.random.default_rng(0)  # its own, so that no other random numbers change
    steps = length + _BURN_IN
    part = max(1, _NUMBERS_AT_ONCE // steps)
    draws = []
    for first in range(0, resamples, part):
        starts = generator.integers(len(innovations), size=(min(part, resamples - first), -(-steps // _BLOCK)))
        index = (starts[:, :, None] + np.arange(_BLOCK)).reshape(len(starts), -1)[:, :steps] % len(innovations)
        draws.append(lfilter([1.0], [1.0, -rho], innovations[index], axis=1)[:, _BURN_IN:])
    return draws


def _refit(model: Model, parameters: Vector, x: Vector, curves: Vector, rounds: int = 6) -> Vector:
    """Least-squares parameters of each curve, (R, 2), by Gauss-Newton steps; NaN where they lead nowhere."""
    fitted = np.repeat(parameters[None], len(curves), 0)
    with np.errstate(all="ignore"):
        for _ in range(rounds):
            values, first, second = model(fitted, x)
            rest = curves - values
            a, b, c = (first * first).sum(1), (first * second).sum(1), (second * second).sum(1)
            u, v = (first * rest).sum(1), (second * rest).sum(1)
            step = np.stack([c * u - b * v, a * v - b * u], 1) / (a * c - b * b)[:, None]
            fitted = fitted + step
            if not (np.abs(step) > 1e-8 * np.abs(fitted)).any():
                break
    return np.where(np.isfinite(fitted).all(1, keepdims=True), fitted, np.nan)
