"""How far a map can be from the optimal one, which is not known: a bound from held-out samples."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gap.checks import check_integer
from lightning_gap.monge.maps.brenier import BrenierMap
from lightning_gap.monge.ot.checks import check_pair
from lightning_gap.monge.ot.costs import Cost, CostLike, SqEuclidean, TranslationInvariantCost, resolve
from lightning_gap.monge.scores.halves import independent_halves, matched, standard_error
from lightning_gap.precision import widest

__all__ = ["ErrorCertificate", "error_certificate", "has_unique_maps"]

# Of the estimate, what the plans do not see of an error; of their noise, what may hide in it: measured on maps that are
# known, see docs/maps.md.
_UNSEEN, _HIDDEN = 0.1, 0.2
_ONE_SIDED = 1.645  # standard errors that 95 % are below


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
    convex: BrenierMap | None = None,
    max_samples: int = 2048,
) -> ErrorCertificate:
    r"""Bound the distance of a map from the optimal one by samples that it was not trained on.

    Source and target are halved. An optimal plan between a half of each sends :math:`x` to :math:`y`, and leaves the
    residual :math:`r = T(x) - y`, which is the map's error and the plan's noise. Noise of plans that share one half only
    is independent but for that half, so products of their residuals hold the error and less of it:

    .. math::
        V_x = E \langle T(x) - y, T(x) - y' \rangle, \qquad V_y = E \langle T(x) - y, T(x') - y \rangle, \qquad
        A = E |T(x) - y|^2

    with :math:`y, y'` from the two halves of the target, and :math:`x, x'` from those of the source. The estimate is
    :math:`V = \max(V_x, V_y)`, the bound :math:`1.1 V + 0.2 (A - V)` and 1.645 standard errors.

    What holds without more: :math:`E\,A \ge W_2^2(T\sharp\mu, \nu)`, and for :math:`T = \nabla\psi` with convex
    :math:`\psi` of curvature at most :math:`\beta`, with :math:`S_n` the best plan's mean :math:`\langle x, y \rangle`
    between n samples,

    .. math::
        E|T - T^*|^2 \le 2 \beta\, (E_\mu \psi + E_\nu \psi^* - \sup_\pi E_\pi \langle x, y \rangle)
            \le 2 \beta\, (E_\mu \psi + E_\nu \psi^* - E\, S_n)

    since the infimum over potentials of a mean over samples is below that of the mean in expectation. ``proven`` is this
    with the largest curvature at the samples. It is loose by the ratio of curvatures and by the noise of n samples, and no
    bound without assumptions is tight in many dimensions: n samples do not tell a measure from the one that sits on
    :math:`n^2` of its points, which is about :math:`n^{-4/d}` away. ``upper`` takes noise of two halves to be alike; that
    it holds was measured.

    Args:
        source: ``(n, d)`` held-out samples of the source.
        mapped: Their images, row by row.
        target: ``(m, d)`` held-out samples of the target, not paired with the others.
        cost: Ground cost for which the optimal map is meant: one that has unique maps, such as ``"sqeuclidean"`` or
            ``pnorm(p)`` with p > 1.
        weights: ``(n,)`` and ``(m,)`` weights, each summing to 1; uniform by default.
        convex: The map itself where it is a :class:`BrenierMap`, for ``proven``.
        max_samples: Most samples of each set, by a fixed permutation: the time grows with their cube, the noise falls.

    Raises:
        TypeError: An argument is no floating-point tensor, or the dtypes differ.
        ValueError: Shapes do not fit, there are fewer than 32 samples, the target does not vary, or the cost's optimal
            maps are not unique.

    Example:
        >>> import torch
        >>> draw = torch.Generator().manual_seed(0)
        >>> x, y = (torch.randn(1000, 2, generator=draw) for _ in range(2))
        >>> print(error_certificate(x, x + 3, y))  # the truth: 100 · 3² · 2 / 2 %
        L2-UVP ≤ 1.1e+03 %, 95 %
        >>> error_certificate(x, x, y).upper < 3  # the truth: 0
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
    rows, columns = independent_halves(("source", "target"), (x, y), weights, max_samples)
    plans = {(i, j): matched(cost, x[rows[i]], y[columns[j]]) for i in (0, 1) for j in (0, 1)}
    residuals = {(i, j): mapped[rows[i]] - y[columns[j]][plan] for (i, j), plan in plans.items()}
    back = {key: residual[torch.argsort(plans[key])] for key, residual in residuals.items()}
    of_source = torch.cat([(residuals[i, 0] * residuals[i, 1]).sum(1) for i in (0, 1)])
    of_target = torch.cat([(back[0, j] * back[1, j]).sum(1) for j in (0, 1)])
    products = max(of_source, of_target, key=lambda each: float(each.mean()))
    total = float(torch.stack([r.square().sum(1).mean() for r in residuals.values()]).mean())
    value = max(float(products.mean()), 0.0)
    noise = max(total - value, 0.0)
    # The two halves of the products have samples in common: they count as one.
    error = standard_error(products) * 2**0.5
    upper = (1 + _UNSEEN) * value + _HIDDEN * noise + _ONE_SIDED * error
    size = len(rows[0])
    proven = None if convex is None else unit * _proven(convex, x, y, rows, columns, plans)
    return ErrorCertificate(
        value=unit * value,
        upper=unit * upper,
        noise=unit * noise,
        proven=proven,
        variance=variance,
        samples=2 * size,
        how=f"products of residuals of four exact plans between halves of {size} held-out samples",
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


def _proven(
    convex: BrenierMap,
    x: Tensor,
    y: Tensor,
    rows: list[Tensor],
    columns: list[Tensor],
    plans: dict[tuple[int, int], Tensor],
) -> float:
    """Return twice the largest curvature times what the duality gap does not exceed at 95 %."""
    if not isinstance(convex.made_for, SqEuclidean):
        raise TypeError(f"convex must be a BrenierMap, got {type(convex).__name__}: leave it out for other maps")
    dtype = next(convex.parameters()).dtype
    xs, ys = (torch.cat([s[half] for half in halves]).to(dtype) for s, halves in ((x, rows), (y, columns)))
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
