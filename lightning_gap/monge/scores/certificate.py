"""How far a map can be from the optimal one, which is not known: a bound from held-out samples."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_gap.checks import check_integer
from lightning_gap.monge.ot.checks import check_pair
from lightning_gap.monge.ot.costs import Cost, CostLike, TranslationInvariantCost, resolve
from lightning_gap.monge.ot.solvers.exact import matched
from lightning_gap.monge.scores.parts import independent_parts, standard_error
from lightning_gap.precision import widest

__all__ = ["ConvexGradient", "ErrorCertificate", "error_certificate", "has_unique_maps"]

# Of the estimate, what the plans do not see of an error; of their noise, what may hide in it: measured on maps that are
# known, see docs/maps.md.
_UNSEEN, _HIDDEN = 0.1, 0.2
_PARTS = 4
_ONE_SIDED = 1.94  # standard errors that 95 % are below, by Student's law of six degrees of freedom


class ConvexGradient(Protocol):
    """The gradient of a convex potential, as :class:`BrenierMap` is one."""

    def potential(self, x: Tensor, /) -> Tensor:
        """Return the potential's values at ``(n, d)`` samples."""

    def hessian(self, x: Tensor, /) -> Tensor:
        """Return its ``(n, d, d)`` second derivatives."""

    def inverse(self, y: Tensor, /) -> Tensor:
        """Return the ``(n, d)`` samples whose images are given."""


@dataclass(frozen=True)
class ErrorCertificate:
    r"""How far a map is from the optimal one at most, in percent of the target's variance (L2-UVP).

    Attributes:
        value: Estimate of :math:`100\, E|T - T^*|^2 / Var(\nu)`.
        upper: What it does not exceed at 95 %.
        noise: What two samples of the same measures differ by, in the same units; errors far below it are not seen.
        proven: For a convex potential, :math:`2 \beta` times its duality gap, which needs no assumption but the
            curvature; ``None`` for other maps.
        variance: :math:`Var(\nu)`, the unit.
        samples: Samples of each set that were taken.
        how: In words.
    """

    value: float
    upper: float
    noise: float
    proven: float | None
    variance: float
    samples: int
    how: str

    def __str__(self) -> str:
        return f"L2-UVP ≤ {self.upper:.3g} %, 95 %"


@torch.no_grad()
def error_certificate(
    source: Tensor,
    mapped: Tensor,
    target: Tensor,
    *,
    cost: CostLike = "sqeuclidean",
    weights: tuple[Tensor | None, Tensor | None] = (None, None),
    convex: ConvexGradient | None = None,
    max_samples: int = 4096,
) -> ErrorCertificate:
    r"""Bound the distance of a map from the optimal one by samples that it was not trained on.

    Source and target are cut into four parts each. An optimal plan between a part of each sends :math:`x` to :math:`y`,
    and leaves the residual :math:`T(x) - y`, which is the map's error and the plan's noise. Plans that share one part
    have other noise from the other, so products of their residuals hold the error and less noise:

    .. math::
        V_x = E \langle T(x) - y, T(x) - y' \rangle, \qquad V_y = E \langle T(x) - y, T(x') - y \rangle, \qquad
        A = E |T(x) - y|^2

    with :math:`y, y'` from two parts of the target, and :math:`x, x'` from two of the source. The estimate is
    :math:`V = \max(V_x, V_y)`, the bound :math:`1.1 V + 0.2 (A - V)` and 1.94 standard errors, by the jackknife over
    the parts: shares of clusters vary from sample to sample, which errors of single residuals do not tell.

    What holds without more: :math:`E\,A \ge W_2^2(T\sharp\mu, \nu)`, and for :math:`T = \nabla\psi` with convex
    :math:`\psi` of curvature at most :math:`\beta`, with :math:`S_n` the best plan's mean :math:`\langle x, y \rangle`
    between n samples,

    .. math::
        E|T - T^*|^2 \le 2 \beta\, (E_\mu \psi + E_\nu \psi^* - \sup_\pi E_\pi \langle x, y \rangle)
            \le 2 \beta\, (E_\mu \psi + E_\nu \psi^* - E\, S_n)

    since the infimum over potentials of a mean over samples is below that of the mean in expectation. ``proven`` is
    this with the largest curvature at the samples. It is loose by the ratio of curvatures and by noise, and no
    bound without assumptions is tight in many dimensions: n samples do not tell a measure from the one that sits on
    :math:`n^2` of its points, which is about :math:`n^{-4/d}` away. That ``upper``
    holds was measured.

    Args:
        source: ``(n, d)`` held-out samples of the source.
        mapped: Their images, row by row.
        target: ``(m, d)`` held-out samples of the target, not paired with the others.
        cost: Ground cost for which the optimal map is meant: one that has unique maps, such as ``"sqeuclidean"`` or
            ``pnorm(p)`` with p > 1.
        weights: ``(n,)`` and ``(m,)`` weights, each summing to 1; uniform by default.
        convex: The map itself where it is a :class:`BrenierMap`, for ``proven``.
        max_samples: Most samples of each set, by a fixed permutation: more take longer, and the noise falls.

    Raises:
        TypeError: An argument is no floating-point tensor, or the dtypes differ.
        ValueError: Shapes do not fit, there are fewer than 32 samples, the target does not vary, or the cost's optimal
            maps are not unique.

    Example:
        >>> import torch
        >>> draw = torch.Generator().manual_seed(0)
        >>> x, y = (torch.randn(1000, 2, generator=draw) for _ in range(2))
        >>> 900 < error_certificate(x, x + 3, y).upper < 1300  # the truth: 100 · 3² · 2 / 2 %
        True
        >>> error_certificate(x, x, y).upper < 10  # the truth: 0
        True
    """
    cost = resolve(cost)
    check_pair("source", source, "mapped", mapped, same_length=True)
    check_pair("source", source, "target", target)
    check_integer("max_samples", max_samples, least=64)
    if not has_unique_maps(cost, source):
        raise ValueError(
            f"the cost {cost} has no unique optimal maps that a map could be compared with: use suboptimality, which "
            "needs none"
        )
    x, mapped, y = (samples.to(widest(samples.device)) for samples in (source, mapped, target))
    variance = _variance(y, weights[1])
    if not variance > 0:
        raise ValueError("target does not vary, so no share of its variance can be told: give samples that differ")
    unit = 100 / variance
    rows, columns = independent_parts(("source", "target"), (x, y), weights, max_samples, _PARTS)
    plans = {(i, j): matched(cost, x[r], y[c]) for i, r in enumerate(rows) for j, c in enumerate(columns)}
    residuals = {(i, j): mapped[rows[i]] - y[columns[j]][plan] for (i, j), plan in plans.items()}
    back = {key: residual[torch.argsort(plans[key])] for key, residual in residuals.items()}
    size = len(rows[0])
    # [i, j, k]: of parts i and k of the target with part j of the source, and the other way about.
    of_source = torch.stack([_products([residuals[i, j] for j in range(_PARTS)]) for i in range(_PARTS)], dim=1)
    of_target = torch.stack([_products([back[i, j] for i in range(_PARTS)]) for j in range(_PARTS)], dim=1)
    squares = float(of_source.diagonal(dim1=0, dim2=2).mean())
    shared, error = max(map(_jackknifed, (of_source, of_target)))
    value = max(shared, 0.0)
    noise = max(squares - value, 0.0)
    upper = (1 + _UNSEEN) * value + _HIDDEN * noise + _ONE_SIDED * error
    proven = None if convex is None else unit * _proven(convex, x, y, rows, columns, plans)
    return ErrorCertificate(
        value=unit * value,
        upper=unit * upper,
        noise=unit * noise,
        proven=proven,
        variance=variance,
        samples=_PARTS * size,
        how=f"products of residuals of {_PARTS**2} exact plans between parts of {size} held-out samples",
    )


def has_unique_maps(cost: Cost, samples: Tensor) -> bool:
    """Return whether optimal maps for a cost are known to be unique: for strictly convex functions of x - y."""
    if not isinstance(cost, TranslationInvariantCost):
        return False
    try:
        cost.grad_h_conjugate(torch.zeros_like(samples[:1]))
    except NotImplementedError:
        return False
    return True


def _variance(y: Tensor, weights: Tensor | None) -> float:
    if weights is None:
        return float(y.var(0, correction=0).sum())
    w = weights.to(y) / weights.to(y).sum()
    return float(w @ (y - w @ y).square().sum(1))


def _products(residuals: list[Tensor]) -> Tensor:
    """Return the mean products of all pairs of residuals at the same points."""
    r = torch.stack(residuals)
    return torch.einsum("ind,knd->ik", r, r) / r.shape[1]


def _jackknifed(products: Tensor) -> tuple[float, float]:
    """Return the mean of ``[i, j, k]`` with i unlike k, and its standard error by leaving out each i, k and each j."""

    def mean(ends: list[int], middles: list[int]) -> Tensor:
        some = products[ends][:, middles][:, :, ends]
        n = len(ends)
        return (some.sum() - some.diagonal(dim1=0, dim2=2).sum()) / (n * (n - 1) * len(middles))

    every = list(range(_PARTS))
    variance = 0.0
    for left_out in (
        [mean([k for k in every if k != out], every) for out in every],
        [mean(every, [k for k in every if k != out]) for out in every],
    ):
        variance += (_PARTS - 1) * float(torch.stack(left_out).var(correction=0))
    return float(mean(every, every)), variance**0.5


def _proven(
    convex: ConvexGradient,
    x: Tensor,
    y: Tensor,
    rows: list[Tensor],
    columns: list[Tensor],
    plans: dict[tuple[int, int], Tensor],
) -> float:
    """Return twice the largest curvature times what the duality gap does not exceed at 95 %."""
    xs, ys = (torch.cat([s[part] for part in parts]) for s, parts in ((x, rows), (y, columns)))
    if isinstance(convex, nn.Module) and (weights := next(convex.parameters(), None)) is not None:
        xs, ys = xs.to(weights), ys.to(weights)
    roots = convex.inverse(ys)
    curvature = 0.0
    for points in torch.cat([xs, roots]).split(256):
        curvature = max(curvature, float(torch.linalg.eigvalsh(convex.hessian(points))[:, -1].amax()))
    size = len(rows[0])
    own = convex.potential(xs).to(x).split(size)
    conjugate = ((roots * ys).sum(-1) - convex.potential(roots)).to(x).split(size)
    gaps = torch.stack(
        [own[i] + conjugate[j][plan] - (x[rows[i]] * y[columns[j]][plan]).sum(1) for (i, j), plan in plans.items()]
    )
    mean = gaps.mean(0)
    return 2 * curvature * (float(mean.mean()) + _ONE_SIDED * standard_error(mean))
