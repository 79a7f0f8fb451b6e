r"""Where an entropic plan sends a point: an image that is right for the cost, also of points that the plan never saw.

The dual potential g of a plan extends it to any point x, whose conditional weights are
:math:`p_j(x) \propto b_j \exp((g_j - c(x, y_j)) / \varepsilon)`.
"""

from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import normalize

from lightning_gap.monge.ot.costs import (
    Cost,
    Euclidean,
    Geodesic,
    Mahalanobis,
    PNorm,
    SqEuclidean,
    TranslationInvariantCost,
)
from lightning_gap.monge.ot.costs.formula import CostFormula, formula_of
from lightning_gap.monge.ot.costs.geometry import Fill, Geometry
from lightning_gap.monge.ot.limits import LIMITS
from lightning_gap.monge.ot.result import OTResult
from lightning_gap.monge.ot.solvers.blocks import row_blocks
from lightning_gap.precision import full_precision

__all__ = ["HalfPlan", "ImageRule", "StrictlyConvex", "half_plan", "has_gradient_map", "plan_images", "strictly_convex"]

ImageRule = Literal["gradient", "mean"]

# Pairs of smaller conditional weight, as a share of the largest of the point, add nothing to an image.
_NEGLIGIBLE = 1e-6
_KARCHER_STEPS = 5


class HalfPlan(NamedTuple):
    """The target's side of an entropic plan, which tells where any point is sent.

    Attributes:
        points: ``(m, d)`` samples of the target, moved by ``shift``.
        weights: ``(m,)`` positive weights of these.
        potential: ``(m,)`` dual potential, in units of the cost.
        epsilon: Regularization, in units of the cost.
        cost: The cost that the plan was solved with.
        shift: ``(d,)`` what was added to the target's samples, so that both means agree; of squared costs the plan is
            the same, and epsilon the share of a cost that does not count the way between the means.
    """

    points: Tensor
    weights: Tensor
    potential: Tensor
    epsilon: float
    cost: Cost
    shift: Tensor | None = None


def half_plan(result: OTResult, shift: Tensor | None = None) -> HalfPlan:
    """Return the target's side of a solved problem."""
    if result.g is None:
        raise ValueError("an exact plan has no potentials, so it does not extend to new points: give an epsilon")
    p, kept = result.problem, result.problem.b > 0
    return HalfPlan(p.y[kept], p.b[kept], result.g[kept], result.epsilon, p.cost, shift)


def plan_images(plan: HalfPlan, x: Tensor, cost: Cost, rule: ImageRule = "gradient") -> Tensor:
    r"""Return the images of ``(n, d)`` points by a plan, in blocks of rows, differentiably if the points are.

    For a cost :math:`h(x - y)` with :math:`\nabla h^*` the image is :math:`x - \nabla h^*(\sum_j p_j \nabla h(x -
    y_j))`, the map of the plan's own potential (Pooladian and Niles-Weed 2021, "Entropic Estimation of Optimal
    Transport Maps"; Cuturi, Klein and Ablin 2023, "Monge, Bregman and Occam"): :math:`\sum_j p_j y_j` for squared
    costs. For the geodesic cost it is the Karcher mean of the :math:`y_j`; for all others, and by the rule ``"mean"``,
    their mean.
    """
    m, parts, y = len(plan.points), [], plan.points
    G = plan.potential / plan.epsilon + plan.weights.log()
    exponents_of = plan.cost.geometry.exponents(y, G, plan.epsilon)
    followed = torch.is_grad_enabled() and x.requires_grad
    with torch.autocast(x.device.type, enabled=False), full_precision(x.device):
        for rows in row_blocks(x, m):
            own = x[rows]
            if followed:
                exponents = G - plan.cost.pairwise(own, y) / plan.epsilon
            else:
                exponents = exponents_of(own.new_empty(len(own), m), own)
            parts.append(_image(cost, own, y, exponents.softmax(dim=1), rule))
    if not parts:
        return x.clone()
    return torch.cat(parts) if plan.shift is None else torch.cat(parts) - plan.shift


def _image(cost: Cost, x: Tensor, y: Tensor, P: Tensor, rule: ImageRule) -> Tensor:
    """Return the images of points with conditional weights ``P``, ``(n, m)``, by the rule of the cost."""
    mean = P @ y
    if isinstance(cost, Geodesic):
        return _karcher_mean(mean, y, P)
    if rule == "mean" or isinstance(cost, SqEuclidean | Mahalanobis):
        return mean
    if not isinstance(cost, TranslationInvariantCost) or not has_gradient_map(cost, x.shape[1]):
        return mean
    return x - cost.grad_h_conjugate(_mean_gradient(cost, x, y, P))


def has_gradient_map(cost: Cost, dim: int) -> bool:
    r"""Return whether a cost is :math:`h(x - y)` and gives :math:`\nabla h^*`."""
    if not isinstance(cost, TranslationInvariantCost):
        return False
    try:
        cost.grad_h_conjugate(torch.eye(dim))
    except NotImplementedError:
        return False
    return True


def _mean_gradient(cost: TranslationInvariantCost, x: Tensor, y: Tensor, P: Tensor) -> Tensor:
    r"""Return :math:`\sum_j P_{ij} \nabla h(x_i - y_j)` over the pairs that count."""
    total = torch.zeros_like(x)
    i, j = (P.detach() > _NEGLIGIBLE * P.detach().amax(1, keepdim=True)).nonzero(as_tuple=True)
    followed, size = P.requires_grad, max(1, LIMITS.cached.on(x.device) // x.shape[1])
    for rows, columns in zip(i.split(size), j.split(size), strict=True):
        with torch.enable_grad():
            z = x[rows] - y[columns]
            z = z if followed else z.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(cost.h(z).sum(), z, create_graph=followed)
        total = total.index_add(0, rows, P[rows, columns, None] * gradient)
    return total


def _karcher_mean(mean: Tensor, y: Tensor, P: Tensor) -> Tensor:
    """Return the points of the unit sphere whose squared angles to the ``y`` are least on average (Karcher 1977)."""
    z = normalize(mean, dim=-1)
    for _ in range(_KARCHER_STEPS):
        cosines = (z @ y.mT).clamp(-1 + 1e-6, 1 - 1e-6)
        # The tangent vectors to the y, of their angles' lengths.
        W = P * cosines.acos() * (1 - cosines.square()).rsqrt()
        v = W @ y - (W * cosines).sum(1, keepdim=True) * z
        length = vector_norm(v, dim=-1, keepdim=True)
        z = normalize(length.cos() * z + torch.sinc(length / torch.pi) * v, dim=-1)
    return z


class StrictlyConvex(Cost):
    r"""A distance plus a small multiple of a square, :math:`c + t c_2`, whose plans are those of c with ties broken.

    For :math:`\|x - y\|` many plans are optimal: mass may pass other mass along a ray at no cost. The square has it
    keep its order (Caffarelli, Feldman and McCann 2002; Ambrosio 2003).
    """

    name: ClassVar[str] = "strictly_convex"

    def __init__(self, cost: Cost, slope: float) -> None:
        self.cost, self.slope = cost, slope

    def elementwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the sum."""
        c = self.cost.elementwise(x, y)
        return c + self.slope * (SqEuclidean().elementwise(x, y) if isinstance(self.cost, PNorm) else c.square())

    def pairwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the matrix of sums."""
        c = self.cost.pairwise(x, y)
        return c + self.slope * (SqEuclidean().pairwise(x, y) if isinstance(self.cost, PNorm) else c.square())

    def check_domain(self, name: str, points: Tensor) -> None:
        """Refuse what the cost refuses."""
        self.cost.check_domain(name, points)

    def __str__(self) -> str:
        return f"{self.cost} + {self.slope:.3g} times its square"

    @property
    def geometry(self) -> Geometry:
        """The cost's own, and its square."""
        return _WithSquare(self)

    @property
    def formula(self) -> CostFormula | None:
        """The cost's own, and its square."""
        own = formula_of(self.cost)
        if own is None or own.scale != 1:
            return None
        if isinstance(self.cost, PNorm):
            return own._replace(
                term=f"{own.term} + q * z * z", term_slope=f"{own.term_slope} + 2 * q * z", number=self.slope
            )
        outer, slope = f"({own.outer})", f"({own.outer_slope})"
        return own._replace(
            outer=f"{outer} + q * {outer} * {outer}", outer_slope=f"{slope} * (1 + 2 * q * {outer})", number=self.slope
        )


class _WithSquare(Geometry):
    def filler(self, y: Tensor) -> Fill:
        """Return a function that writes the sums."""
        cost = self.cost
        assert isinstance(cost, StrictlyConvex)
        fill = cost.cost.geometry.filler(y)
        if isinstance(cost.cost, PNorm):
            square = SqEuclidean().geometry.filler(y)
            return lambda out, x: fill(out, x).add_(square(torch.empty_like(out), x), alpha=cost.slope)

        def both(out: Tensor, x: Tensor) -> Tensor:
            fill(out, x)
            return out.addcmul_(out, out, value=cost.slope)

        return both


def strictly_convex(cost: Cost, slope: float) -> Cost:
    """Return the cost, or one whose plans are unique where the cost is a distance and its plans are not."""
    distance = isinstance(cost, Euclidean | Geodesic) or (isinstance(cost, PNorm) and cost.p == 1)
    return StrictlyConvex(cost, slope) if distance and slope else cost
