"""Both laws as functions of x = log t, which is a line for ultra-slow diffusion and an exponential for a power."""

import math

import numpy as np

from lightning_gap.diffusion.bootstrap import Vector

__all__ = ["least_squares_line", "least_squares_power", "line_law", "line_time", "power_law", "power_time"]


def line_law(parameters: Vector, x: Vector) -> tuple[Vector, Vector, Vector]:
    """Return a + b·x, and its derivatives by both."""
    values = parameters[:, :1] + parameters[:, 1:] * x
    return values, np.ones_like(values), np.broadcast_to(x, values.shape)


def power_law(parameters: Vector, x: Vector) -> tuple[Vector, Vector, Vector]:
    """Return C·exp(p·x), and its derivatives by both."""
    shape = np.exp(parameters[:, 1:] * x)
    values = parameters[:, :1] * shape
    return values, shape, values * x


def least_squares_line(x: Vector, y: Vector) -> Vector:
    """Return intercept and slope of the least-squares line."""
    centred = x - x.mean()
    slope = centred @ y / (centred @ centred)
    return np.array([y.mean() - slope * x.mean(), slope])


def least_squares_power(x: Vector, d: Vector) -> Vector:
    """Return C and p of the least-squares C·exp(p·x), by variable projection on C."""
    low, high = -8.0, 8.0
    for _ in range(5):  # each round narrows the bracket 128 times
        p = np.linspace(low, high, 257)
        shape = np.exp(p[:, None] * x)
        c = (shape @ d) / (shape * shape).sum(1)
        best = int(((d - c[:, None] * shape) ** 2).sum(1).argmin())
        low, high = p[max(best - 1, 0)], p[min(best + 1, 256)]
    return np.array([c[best], p[best]])


def line_time(a: Vector, b: Vector, target: float) -> Vector:
    """Return t at which a + b·log t reaches a distance; infinite where it never does."""
    with np.errstate(all="ignore"):
        return np.where(b > 0, np.exp((target - a) / b), math.inf)


def power_time(c: Vector, p: Vector, target: float) -> Vector:
    """Return t at which c·t^p reaches a distance; infinite where it never does."""
    with np.errstate(all="ignore"):
        return np.where((c > 0) & (p > 0), np.exp(np.log(target / c) / p), math.inf)
