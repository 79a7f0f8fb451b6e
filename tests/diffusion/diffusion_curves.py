import math

import torch

from lightning_gap.diffusion import next_log_update


def log_grid(last, points_per_decade=20):
    grid = [1]
    while grid[-1] < last:
        grid.append(next_log_update(grid[-1], points_per_decade))
    return torch.tensor(grid, dtype=torch.float64)


def correlated_noise(points, generator, correlation=0.5):
    noise = [torch.randn((), generator=generator, dtype=torch.float64)]
    for _ in range(points - 1):
        fresh = torch.randn((), generator=generator, dtype=torch.float64)
        noise.append(correlation * noise[-1] + math.sqrt(1 - correlation**2) * fresh)
    return torch.stack(noise)
