"""Least squares: a map is fitted to images that are given."""

import math

import torch
from torch import Tensor, nn

from lightning_gap.monge.maps.descent import drawn_rows, minimize
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
    like = next(p for p in net.parameters() if p.requires_grad)
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

    best = math.inf

    def better() -> bool:
        nonlocal best
        now, before = float(loss_on(held)), best
        best = min(now, best)
        return now < before

    resting = [module for module in net.modules() if not module.training]
    net.train()  # where a map is flat or steep, it has slopes to learn by in training mode only
    if len(held):
        with torch.no_grad():
            better()
    minimize(
        net,
        lambda step: loss_on(rows[drawn_rows(rows, None, _BATCH, generator)]),
        steps=steps, lr=lr, warm_up=min(warm_up, steps // 4), weight_decay=weight_decay,
        better=better if len(held) else None, looks=_LOOKS,
    )  # fmt: skip
    for module in resting:
        module.training = False
