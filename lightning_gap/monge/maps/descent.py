"""Steps of a map's start: Adam on a loss of random rows, and the weights that looks at other samples favour."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_gap.monge.ot.subsets import drawn_by_weight

__all__ = ["drawn_rows", "minimize"]


def minimize(
    net: nn.Module,
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    warm_up: int,
    better: Callable[[], bool] | None = None,
    looks: int = 1,
    weight_decay: float = 0.0,
) -> None:
    """Minimize the loss of each step, whose rate warms up and decays along a cosine.

    ``better`` looks at the map so many times, without gradients: the map is left with the weights of the last time that
    it said yes, or as it was before the first step; and with those of the last step where nothing looks.
    """
    parameters = [p for p in net.parameters() if p.requires_grad]
    with torch.inference_mode(False), torch.enable_grad():
        kept = [p.detach().clone() for p in parameters]
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
        for step in range(steps):
            rate = lr * min(1, (step + 1) / (warm_up + 1)) * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.param_groups[0]["lr"] = rate
            for p, gradient in zip(parameters, torch.autograd.grad(loss(step), parameters), strict=True):
                p.grad = gradient
            optimizer.step()
            if better is None or ((step + 1) % max(1, steps // looks) and step + 1 < steps):
                continue
            with torch.no_grad():
                if better():
                    for keep, p in zip(kept, parameters, strict=True):
                        keep.copy_(p)
        with torch.no_grad():
            for keep, p in zip(kept, parameters, strict=True):
                p.grad = None
                if better is not None:
                    p.copy_(keep)


def drawn_rows(points: Tensor, weights: Tensor | None, most: int, generator: torch.Generator) -> Tensor:
    """Return random rows of the points, as many as there are at most, by weight."""
    size = min(most, len(points))
    if weights is None:
        rows = torch.randint(len(points), (size,), generator=generator)
    else:
        rows = drawn_by_weight(weights.double(), size, generator)
    return rows.to(points.device)
