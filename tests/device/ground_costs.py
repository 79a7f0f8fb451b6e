"""One ground cost of every kind, by name."""

import torch
from torch import Tensor

from lightning_gap import costs

FACTOR = ((1.0, 0.2, 0.0), (0.2, 2.0, 0.1), (0.0, 0.1, 0.5))


def squared_with_a_twist(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().sum(-1) + 0.1 * (x - y).abs().sum(-1)


COSTS = {
    "sqeuclidean": "sqeuclidean",
    "euclidean": "euclidean",
    "mahalanobis": costs.Mahalanobis(torch.tensor(FACTOR)),
    "pnorm": "pnorm(p=1.5)",
    "sqpnorm": "sqpnorm(p=1.5)",
    "elastic": "elastic",
    "cosine": "cosine",
    "geodesic": "geodesic",
    "function": squared_with_a_twist,
}
