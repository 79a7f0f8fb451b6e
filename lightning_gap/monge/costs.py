"""Ground costs :math:`c(x, y)`: the public face of :mod:`lightning_gap.monge.ot.costs`."""

from lightning_gap.monge.ot.costs import (
    CallableCost,
    Cosine,
    Cost,
    Elastic,
    Euclidean,
    Geodesic,
    Mahalanobis,
    PlanFactors,
    PNorm,
    SqEuclidean,
    SqPNorm,
    TranslationInvariantCost,
    resolve,
)

__all__ = [
    "CallableCost",
    "Cosine",
    "Cost",
    "Elastic",
    "Euclidean",
    "Geodesic",
    "Mahalanobis",
    "PNorm",
    "PlanFactors",
    "SqEuclidean",
    "SqPNorm",
    "TranslationInvariantCost",
    "resolve",
]
