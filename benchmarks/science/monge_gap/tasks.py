"""Samples in the plane, one function for each side of each task."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["TASKS", "Task", "samples"]

Array = NDArray[np.float32]


class Task(NamedTuple):
    """A source and a target to draw from, and what they are called."""

    title: str
    source: Callable[[int, int], Array]
    target: Callable[[int, int], Array]


def _rotated(x: NDArray[np.float64], angle: float) -> NDArray[np.float64]:
    c, s = np.cos(angle), np.sin(angle)
    return x @ np.array([[c, s], [-s, c]])


def moon(n: int, seed: int) -> Array:
    """Return the upper one of scikit-learn's two moons, turned by 30 degrees, as in OTT-JAX's tutorial."""
    from sklearn.datasets import make_moons

    x, _ = make_moons(n_samples=(n, 0), random_state=seed, noise=0.05)
    return np.add(_rotated(x, np.pi / 6), [0.0, -0.5]).astype(np.float32)


def s_curve(n: int, seed: int) -> Array:
    """Return scikit-learn's S-curve, turned by 90 degrees and scaled, as in OTT-JAX's tutorial."""
    from sklearn.datasets import make_s_curve

    x, _ = make_s_curve(n_samples=n, random_state=seed, noise=0.05)
    return np.add(0.6 * _rotated(x[:, [2, 0]], np.pi / 2), [1.0, -2.0]).astype(np.float32)


def eight_gaussians(n: int, seed: int) -> Array:
    """Return eight narrow Gaussians on a circle of radius 2."""
    draws = np.random.default_rng(seed)
    angles = 2 * np.pi * draws.integers(8, size=n) / 8
    return (2 * _circle(angles) + 0.15 * draws.normal(size=(n, 2))).astype(np.float32)


def two_circles(n: int, seed: int) -> Array:
    """Return circles of radius 1 and 3, as many samples on each."""
    draws = np.random.default_rng(seed)
    radii = draws.choice([1.0, 3.0], size=(n, 1))
    return (radii * _circle(2 * np.pi * draws.random(n)) + 0.1 * draws.normal(size=(n, 2))).astype(np.float32)


def _circle(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def square(n: int, seed: int) -> Array:
    """Return a square of side 2."""
    return (2 * np.random.default_rng(seed).random((n, 2)) - 1).astype(np.float32)


def rectangle(n: int, seed: int) -> Array:
    """Return a wide and flat rectangle around the same centre."""
    return ((2 * np.random.default_rng(seed).random((n, 2)) - 1) * [3.0, 0.4]).astype(np.float32)


TASKS = {
    "moon": Task("moon to S-curve", moon, s_curve),
    "circles": Task("eight Gaussians to two circles", eight_gaussians, two_circles),
    "square": Task("square to rectangle", square, rectangle),
}


def samples(task: str, seed: int, train: int = 16_384, test: int = 2048) -> dict[str, Array]:
    """Return samples to train on, to test on, and once more of the target, for the scores' sampling error.

    Args:
        task: A key of ``TASKS``.
        seed: From which all of them follow.
        train: Samples of each side to train on.
        test: Samples of each side to test on.
    """
    _, source, target = TASKS[task]
    seeds = np.random.default_rng(seed).integers(2**31, size=5).tolist()
    return {
        "train_x": source(train, seeds[0]),
        "train_y": target(train, seeds[1]),
        "test_x": source(test, seeds[2]),
        "test_y": target(test, seeds[3]),
        "other_y": target(test, seeds[4]),
    }
