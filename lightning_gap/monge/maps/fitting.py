"""Least squares: a map is fitted to images that are given."""

import math

import torch
from torch import Tensor, nn

from lightning_gap.monge.maps.starts import PlanTargets

__all__ = ["fit_images"]

# Rows of a step, and the part of all rows that is held back; how often these are looked at.
_BATCH, _HELD_BACK, _LOOKS = 512, 0.1, 20
_FEW = 50


def fit_images(
    net: nn.Module, targets: PlanTargets, *, steps: int, lr: float, warm_up: int = 0, weight_decay: float = 0.0
) -> None:
    """Fit a map to images by least squares, and leave it with the weights that were best on rows held back.

    Adam with a cosine decay, on random rows; a generator of its own draws them. Where the map is best before the first
    step, it stays as it is.
    """
    warm_up = min(warm_up, steps // 4)
    parameters = [p for p in net.parameters() if p.requires_grad]
    like = parameters[0]
    x, images = targets.points.to(like), targets.images.to(like)
    condition = None if targets.condition is None else targets.condition.to(like.device)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator).to(x.device)
    held = order[: int(_HELD_BACK * len(x))] if len(x) >= _FEW else order[:0]
    rows = order[len(held) :]
    scale = (images - images.mean(0)).square().sum(-1).mean()
    scale = torch.where(scale > 0, scale, 1)

    def loss_on(some: Tensor) -> Tensor:
        arguments = (x[some],) if condition is None else (x[some], condition[some])
        loss: Tensor = (net(*arguments) - images[some]).square().sum(-1).mean() / scale
        return loss

    def look(best: float) -> float:
        with torch.no_grad():
            now = float(loss_on(held))
        if now < best:
            for kept, p in zip(weights, parameters, strict=True):
                kept.copy_(p.detach())
            return now
        return best

    resting = [module for module in net.modules() if not module.training]
    net.train()  # where a map is flat or steep, it has slopes to learn by in training mode only
    with torch.inference_mode(False), torch.enable_grad():
        weights = [p.detach().clone() for p in parameters]
        best = look(math.inf) if len(held) else 0.0
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
        for step in range(steps):
            rate = lr * min(1, (step + 1) / (warm_up + 1)) * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.param_groups[0]["lr"] = rate
            picked = torch.randint(len(rows), (min(_BATCH, len(rows)),), generator=generator).to(x.device)
            for p, gradient in zip(parameters, torch.autograd.grad(loss_on(rows[picked]), parameters), strict=True):
                p.grad = gradient
            optimizer.step()
            if len(held) and ((step + 1) % max(1, steps // _LOOKS) == 0 or step + 1 == steps):
                best = look(best)
        with torch.no_grad():
            for kept, p in zip(weights, parameters, strict=True):
                p.grad = None
                if len(held):
                    p.copy_(kept)
    for module in resting:
        module.training = False
