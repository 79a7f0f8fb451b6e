r"""Ground costs :math:`c(x, y)`, as small frozen classes.

A cost says how dear it is to move a unit of mass from :math:`x` to :math:`y`. Each class knows its matrix over two sets
of samples, its values over pairs, its KeOps formula, and, where :math:`c(x, y) = h(x - y)` with :math:`h` strictly
convex, the gradient of the conjugate :math:`h^*` which structured maps need (Uscidda and Cuturi 2023, section 4).

``"sqeuclidean"`` is :math:`\|x - y\|^2` as in OTT-JAX, POT and SciPy, and not the half of it as in GeomLoss, so that an
:math:`\varepsilon` means the same here and there.
"""

from lightning_gap.monge.ot.costs.angles import Cosine, Geodesic
from lightning_gap.monge.ot.costs.base import Cost, TranslationInvariantCost
from lightning_gap.monge.ot.costs.euclidean import Euclidean, Mahalanobis, SqEuclidean
from lightning_gap.monge.ot.costs.formula import CostFormula
from lightning_gap.monge.ot.costs.geometry import PlanFactors
from lightning_gap.monge.ot.costs.names import CallableCost, resolve
from lightning_gap.monge.ot.costs.names import CostLike as CostLike
from lightning_gap.monge.ot.costs.names import is_learned as is_learned
from lightning_gap.monge.ot.costs.norms import Elastic, PNorm, SqPNorm

__all__ = [
    "CallableCost",
    "Cosine",
    "Cost",
    "CostFormula",
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
