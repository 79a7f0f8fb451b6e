"""How often the right law is preferred, and how often its interval and the forecast cover the truth, on known curves.

    python -m benchmarks.science.diffusion_laws [--seeds 60]

Curves are 0.5 + log t and 0.3·t^0.35 at 20 points a decade, with noise of 5 % of the curve, or of half its end, that is
a first-order autoregression along the points; and random walks in 1,000 dimensions whose expected square distance is
that of the law. The forecast is of the distance after five times as many updates.
"""

import argparse
import math

import torch
from torch import Tensor

from lightning_gap.diffusion import fit_diffusion, forecast_updates, next_log_update

NOISES = (*(f"{kind} {rho}" for kind in ("additive", "relative") for rho in (0.0, 0.5, 0.8)), "walk")


def grid(last: int) -> Tensor:
    points = [1]
    while points[-1] < last:
        points.append(next_log_update(points[-1], 20))
    return torch.tensor(points, dtype=torch.float64)


def autoregression(points: int, rho: float, generator: torch.Generator) -> Tensor:
    fresh = torch.randn(points, generator=generator, dtype=torch.float64)
    noise = [fresh[0]]
    for drawn in fresh[1:]:
        noise.append(rho * noise[-1] + math.sqrt(1 - rho**2) * drawn)
    return torch.stack(noise)


def walk(squares: Tensor, generator: torch.Generator, size: int = 1000) -> Tensor:
    steps = torch.diff(squares, prepend=torch.zeros(1, dtype=torch.float64)).sqrt()
    normal = torch.randn(len(squares), size, generator=generator, dtype=torch.float64)
    return (steps[:, None] * normal).cumsum(0).norm(dim=1) / math.sqrt(size)


def curve(clean: Tensor, noise: str, generator: torch.Generator) -> Tensor:
    if noise == "walk":
        return walk(clean.square(), generator)
    kind, rho = noise.split()
    drawn = 0.05 * autoregression(len(clean), float(rho), generator)
    return (clean * (1 + drawn) if kind == "relative" else clean + drawn * clean.max() / 2).clamp(min=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=60)
    seeds = parser.parse_args().seeds
    print(f"{'updates':>8} {'law':6}{'noise':14}{'right':>8}{'interval':>10}{'forecast':>10}")
    for last in (1_000, 10_000):
        t = grid(last)
        for law in ("log", "power"):
            clean, truth = (0.5 + t.log(), 1.0) if law == "log" else (0.3 * t**0.35, 0.35)
            target = 0.5 + math.log(5 * last) if law == "log" else 0.3 * (5 * last) ** 0.35
            for noise in NOISES:
                right = covered = foreseen = 0
                for seed in range(seeds):
                    d = curve(clean, noise, torch.Generator().manual_seed(seed))
                    fit, forecast = fit_diffusion(t, d), forecast_updates(t, d, target, resamples=199)
                    low, high = fit.log_slope_interval if law == "log" else fit.power_exponent_interval
                    right += fit.preferred == law
                    covered += low <= truth <= high
                    foreseen += forecast.low <= 5 * last <= forecast.high
                shares = f"{right / seeds:8.0%}{covered / seeds:10.0%}{foreseen / seeds:10.0%}"
                print(f"{last:8} {law:6}{noise:14}{shares}", flush=True)


if __name__ == "__main__":
    main()
