r"""The random potential behind ultra-slow diffusion, probed around the weights.

Hoffer, Hubara, Soudry 2017 (arXiv:1705.08741), appendix B: at w = w_0 + z·v, with v a random direction and z uniform,
the standard deviation of the loss grows as ‖w − w_0‖^γ. Then E(L(w₁) − L(w₂))² ~ ‖w₁ − w₂‖^α with α = 2γ, and the
walk is ultra-slow, ‖w_t − w_0‖ ~ (log t)^{2/α}. The paper measured γ = 1 for ResNet-44 on CIFAR-10.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_gap.checks import check_choice, check_integer, check_number
from lightning_gap.diffusion.bootstrap import Vector
from lightning_gap.diffusion.distance import ParameterFilter, check_filter, tracked_parameters
from lightning_gap.diffusion.plot import axes_or_new
from lightning_gap.trainer.internals.of_torch import BatchNormBase

__all__ = ["LandscapeFit", "estimate_alpha"]

M = TypeVar("M", bound=nn.Module)
_FEWEST_IN_BIN = 4
_RESAMPLES = 999


@dataclass(frozen=True)
class LandscapeFit:
    """How the loss spreads with the distance from the weights.

    Attributes:
        gamma: γ of std(L) = k·r^γ.
        gamma_interval: Its confidence interval, by bootstrap over the samples.
        alpha: α = 2γ.
        alpha_interval: Its confidence interval.
        confidence: Of both intervals.
        scale: k.
        r2: Coefficient of determination of log std against log r, over bins weighted by their samples.
        radii: The distance each bin stands for: (bins,).
        std: The standard deviation of the loss in each bin: (bins,).
        distances: ‖w − w_0‖ of every sample: (samples,).
        losses: L(w) of every sample: (samples,).
        loss_at_start: L(w_0).
    """

    gamma: float
    gamma_interval: tuple[float, float]
    alpha: float
    alpha_interval: tuple[float, float]
    confidence: float
    scale: float
    r2: float
    radii: tuple[float, ...]
    std: tuple[float, ...]
    distances: tuple[float, ...]
    losses: tuple[float, ...]
    loss_at_start: float

    def plot(self, ax: Any = None) -> tuple[Any, Any]:
        """Draw the standard deviation of the loss against the distance, and the fitted power.

        Args:
            ax: Matplotlib axes to draw on; new ones by default.

        Returns:
            The figure and its axes.

        Raises:
            ModuleNotFoundError: Matplotlib is not installed.
        """
        ax = axes_or_new(ax)
        ax.plot(self.radii, self.std, "o", color="C0", label="std of the loss")
        r = np.geomspace(min(self.radii), max(self.radii), 100)
        ax.plot(r, self.scale * r**self.gamma, color="C1", label=f"γ = {self.gamma:.2f}, R² {self.r2:.3f}")
        ax.set(xlabel="‖w − w₀‖", ylabel="std of L(w)", xscale="log", yscale="log")
        ax.legend()
        return ax.figure, ax


def estimate_alpha(
    module: M,
    loss: Callable[[M], Tensor],
    *,
    radius: float,
    samples: int = 1000,
    bins: int = 20,
    statistic: Literal["std", "rms"] = "std",
    batch_norm: Literal["batch", "running"] = "batch",
    exclude: ParameterFilter | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> LandscapeFit:
    r"""Measure how the loss spreads around the weights, and the exponent α of the random potential.

    ``samples`` times, v is drawn uniformly from the unit sphere of all tracked parameters together and z from [0, c],
    and L(w_0 + z·v) is taken. In each of ``bins`` intervals of z the standard deviation of L is computed, about the
    line through the interval's samples, so that a slope of the mean does not count as spread; then
    log std = log k + γ·log r is fitted by least squares, weighted by the samples in a bin, and α = 2γ.

    The module is put into evaluation mode, so that dropout adds no noise of its own, except for batch normalization:
    at initialization its running statistics mean nothing. Weights, buffers, gradients, modes and torch's random number
    generators are as before afterwards, also where ``loss`` raises. Costs ``samples`` evaluations of the loss, without
    gradients, and two copies of the tracked parameters. Runs on the module's own devices and dtypes, and under
    ``torch.autocast``; the directions are drawn on the CPU, the same for every device.

    Args:
        module: The model, with its weights at w_0.
        loss: Returns the loss of the module as a scalar tensor. It should use the same data every time: noise of the
            batch adds to the standard deviation, and hides the power near r = 0.
        radius: c, the largest distance; the paper takes the distance that its training travelled, about 10.
        samples: How many points are drawn; the paper draws 1000.
        bins: Intervals of equal length of z. Those with fewer than 4 samples are left out.
        statistic: ``"std"``, as above; ``"rms"`` takes √mean (L(w) − L(w_0))² instead, whose growth contains that of
            the mean.
        batch_norm: ``"batch"`` normalizes with the batch's statistics, ``"running"`` with the running ones.
        exclude: Parameters that stay where they are: a regular expression, or a function of name and parameter.
        confidence: Of the intervals, between 0 and 1.
        seed: Of the directions, distances and resamples.

    Returns:
        γ, α, their intervals, and all that was measured.

    Raises:
        ValueError: An argument is out of range, no parameter is left, parameters are sharded, the loss is not one
            finite number everywhere, or its spread is zero.

    Example:
        >>> layer = torch.nn.Linear(50, 1, bias=False)
        >>> fit = estimate_alpha(layer, lambda layer: layer.weight.sum(), radius=3.0)  # a plane: α = 2
        >>> abs(fit.alpha - 2) < 0.15
        True
    """
    check_number("radius", radius, above=0)
    check_integer("samples", samples, 3 * _FEWEST_IN_BIN)
    check_integer("bins", bins, 3)
    check_choice("statistic", statistic, ("std", "rms"))
    check_choice("batch_norm", batch_norm, ("batch", "running"))
    if exclude is not None:
        check_filter("exclude", exclude)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence!r}")
    weights = tracked_parameters(module, exclude=exclude)
    if not weights:
        raise ValueError("module has no parameter with requires_grad=True that is not excluded: exclude less")
    if any(isinstance(weight, DTensor) for weight in weights.values()):
        raise ValueError("module has sharded parameters (DTensor): probe a copy that is not sharded")
    generator = torch.Generator().manual_seed(seed)
    distances = radius * torch.rand(samples, generator=generator, dtype=torch.float64, device="cpu")
    losses = []
    accelerators = sorted({weight.device.index for weight in weights.values() if weight.device.type == "cuda"})
    with torch.no_grad(), torch.random.fork_rng(accelerators), _put_back(module, weights) as start:
        module.eval()
        for part in module.modules():
            if isinstance(part, BatchNormBase) and batch_norm == "batch":
                part.train()
        loss_at_start = _value(loss(module), 0.0)
        for distance in distances.tolist():
            _step(weights, start, distance, generator)
            losses.append(_value(loss(module), distance))
    z, deviation = distances.numpy(), np.array(losses) - loss_at_start
    gamma, interval, scale, r2, radii, std = _fit(z, deviation, radius, bins, statistic, confidence, seed)
    return LandscapeFit(
        gamma=gamma,
        gamma_interval=interval,
        alpha=2 * gamma,
        alpha_interval=(2 * interval[0], 2 * interval[1]),
        confidence=confidence,
        scale=scale,
        r2=r2,
        radii=tuple(radii.tolist()),
        std=tuple(std.tolist()),
        distances=tuple(z.tolist()),
        losses=tuple(losses),
        loss_at_start=loss_at_start,
    )


@contextmanager
def _put_back(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Give a copy of the weights, and put weights, buffers and modes back as they were."""
    start = {name: weight.clone() for name, weight in weights.items()}
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield start
    finally:
        for tensor, before in (*((weights[name], start[name]) for name in start), *buffers):
            tensor.copy_(before)
        for part, training in modes:
            part.training = training


def _step(
    weights: Mapping[str, Tensor], start: Mapping[str, Tensor], distance: float, generator: torch.Generator
) -> None:
    """Put the weights at ``distance`` from the start, in a direction uniform on the sphere."""
    directions = {
        name: torch.randn(weight.shape, generator=generator, dtype=torch.float32, device="cpu")
        for name, weight in weights.items()
    }
    length = math.sqrt(sum(float(direction.square().sum()) for direction in directions.values()))
    for name, direction in directions.items():
        step = direction.mul_(distance / length).to(weights[name].device)
        # Not in half precision: there a short step would be rounded away before it is added.
        weights[name].copy_(start[name] + step)


def _value(loss: Any, distance: float) -> float:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"loss must return a scalar tensor, got {type(loss).__name__} {getattr(loss, 'shape', '')}")
    value = float(loss)
    if not math.isfinite(value):
        raise ValueError(f"loss is {value} at distance {distance:.3g}: take a smaller radius, or check the data")
    return value


def _fit(
    z: Vector, deviation: Vector, radius: float, bins: int, statistic: str, confidence: float, seed: int
) -> tuple[float, tuple[float, float], float, float, Vector, Vector]:
    """Return γ, its interval, the scale k, R², and the bins' radii and standard deviations."""
    member = np.eye(bins)[np.minimum((bins * z / radius).astype(int), bins - 1)]
    member = member[:, member.sum(0) >= _FEWEST_IN_BIN]
    if member.shape[1] < 3:
        raise ValueError(f"samples={len(z)} leave fewer than 3 of bins={bins} with {_FEWEST_IN_BIN} or more: draw more")
    all_once = np.ones((1, len(z)))
    if not (_spread(all_once, member, z, deviation, statistic)[1] > 0).all():
        raise ValueError("loss does not change with the weights in some bin: does it use the module that it is given?")
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(len(z), np.full(len(z), 1 / len(z)), size=_RESAMPLES).astype(np.float64)

    def power(times: Vector, gamma: float) -> tuple[Vector, Vector, Vector, Vector, Vector]:
        """Fit log std = log k + γ·log r in each row of ``times`` that the samples are taken."""
        counts, std = _spread(times, member, z, deviation, statistic)
        # Where r^γ has the bin's mean square: its middle would be too far out for the first bins.
        radii = (times @ (member * z[:, None] ** (2 * gamma)) / counts) ** (0.5 / gamma)
        x, y, w = np.log(radii), np.log(std), counts / counts.sum(1, keepdims=True)
        x_mean, y_mean = (w * x).sum(1, keepdims=True), (w * y).sum(1, keepdims=True)
        slope = (w * (x - x_mean) * y).sum(1) / (w * (x - x_mean) ** 2).sum(1)
        rest = y - y_mean - slope[:, None] * (x - x_mean)
        r2 = 1 - (w * rest**2).sum(1) / (w * (y - y_mean) ** 2).sum(1)
        return slope, np.exp(y_mean[:, 0] - slope * x_mean[:, 0]), r2, radii, std

    gamma = 1.0
    for _ in range(10):
        slope, scale, r2, radii, std = (row[0] for row in power(all_once, gamma))
        gamma = max(float(slope), 0.05)
    with np.errstate(all="ignore"):  # a bin may be left with too few
        slopes = power(drawn, gamma)[0]
    low, high = np.quantile(slopes[np.isfinite(slopes)], [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(slope), (float(low), float(high)), float(scale), float(r2), radii, std


def _spread(times: Vector, member: Vector, z: Vector, deviation: Vector, statistic: str) -> tuple[Vector, Vector]:
    """Return samples and spread of each bin, (R, bins), with each sample taken ``times``, (R, n), times."""
    counts = times @ member
    if statistic == "rms":
        return counts, np.sqrt(times @ (member * deviation[:, None] ** 2) / counts)
    # About the bins' means of all samples first, so that the moments lose no digits.
    x, y = ((v - member @ (member.T @ v / member.sum(0))) for v in (z, deviation))
    mean_x, mean_y, xx, yy, xy = (times @ (member * v[:, None]) / counts for v in (x, y, x * x, y * y, x * y))
    along = (xy - mean_x * mean_y) ** 2 / (xx - mean_x**2)
    return counts, np.sqrt(np.maximum(yy - mean_y**2 - along, 0.0) * counts / (counts - 2))
