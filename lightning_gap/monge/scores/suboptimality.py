"""What a map pays beyond the cheapest map to the same images: an interval from held-out samples."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gap.checks import check_integer
from lightning_gap.monge.ot.checks import check_pair
from lightning_gap.monge.ot.costs import Cost, CostLike, resolve
from lightning_gap.monge.ot.solvers.exact import matched
from lightning_gap.monge.scores.parts import independent_parts, standard_error
from lightning_gap.precision import widest

__all__ = ["Suboptimality", "suboptimality"]

_ONE_SIDED = 1.645  # standard errors that 95 % are below


@dataclass(frozen=True)
class Suboptimality:
    r"""What a map pays in vain, in percent of what it pays.

    Attributes:
        value: :math:`100\, (E\, c(x, T(x)) - W_c(\mu, T\sharp\mu)) / E\, c(x, T(x))` of the samples, which is at most
            that of their measure in expectation.
        upper: What that of the measure does not exceed at 95 %.
        paid: :math:`E\, c(x, T(x))`, in units of the cost.
        samples: Pairs that were taken.
        how: In words.
    """

    value: float
    upper: float
    paid: float
    samples: int
    how: str

    def __str__(self) -> str:
        return f"pays {self.value:.3g} % in vain, ≤ {self.upper:.3g} %, 95 %"


@torch.no_grad()
def suboptimality(
    source: Tensor,
    mapped: Tensor,
    *,
    cost: CostLike = "sqeuclidean",
    weights: Tensor | None = None,
    max_samples: int = 4096,
) -> Suboptimality:
    r"""Return what a map pays beyond the cheapest map from the source to the same images.

    .. math::
        E\, c(x, T(x)) - W_c(\mu, T\sharp\mu) \ge 0

    the Monge gap without regularization (Uscidda and Cuturi 2023, equation 5). That of n samples with their images,
    from an exact assignment, is lower in expectation: n points leave less to rearrange. From above, with independent
    halves :math:`x, x'` of the samples and :math:`W_n` the exact cost between such samples,

    .. math::
        W_c(\mu, T\sharp\mu) \ge E\, W_n(x, T(x')) - \tfrac12 E\, W_n(x, x') - \tfrac12 E\, W_n(T(x), T(x'))

    by the triangle inequality if the cost is a metric, as ``"euclidean"`` and ``"geodesic"``; for others it was
    measured to hold.

    Args:
        source: ``(n, d)`` samples.
        mapped: Their images, row by row.
        cost: Ground cost: a name, an instance from :mod:`lightning_gap.costs`, or a function.
        weights: ``(n,)`` weights summing to 1; uniform by default.
        max_samples: Most samples, by a fixed permutation.

    Raises:
        TypeError: An argument is no floating-point tensor, or the dtypes differ.
        ValueError: Shapes do not fit, there are fewer than 32 samples, or the cost is not defined there.

    Example:
        >>> import torch
        >>> x = torch.linspace(0, 1, 400)[:, None]
        >>> round(suboptimality(x, x + 1).value, 6), round(suboptimality(x, 2 - x).value)  # shifted, and flipped
        (0.0, 25)
    """
    cost = resolve(cost)
    check_pair("source", source, "mapped", mapped, same_length=True)
    check_integer("max_samples", max_samples, least=64)
    for name, samples in (("source", source), ("mapped", mapped)):
        cost.check_domain(name, samples)
    x, z = (samples.to(widest(samples.device)) for samples in (source, mapped))
    rows, _ = independent_parts(("source", "source"), (x, x), (weights, weights), max_samples, 2)
    whole = torch.cat(rows)[: max(2, max_samples // 2)]
    paid = cost.paired(x, z)
    saved = cost.paired(x[whole], z[whole]) - cost.paired(x[whole], z[whole][matched(cost, x[whole], z[whole])])
    halves = torch.cat([paid[half] for half in rows])
    total = float(halves.mean())
    if not total > 0:
        return Suboptimality(0.0, 0.0, total, 2 * len(rows[0]), "nothing is paid")
    (a, b), size = rows, len(rows[0])
    between = [_costs(cost, x[a], z[b]), _costs(cost, x[b], z[a])]
    within = [_costs(cost, x[a], x[b]), _costs(cost, z[a], z[b])]
    spare = torch.cat([paid[a], paid[b]]) - torch.cat(between) + torch.cat([torch.stack(within).mean(0)] * 2)
    value = max(float(saved.mean()), 0.0)
    upper = max(float(spare.mean()), value) + _ONE_SIDED * 2**0.5 * standard_error(spare)
    return Suboptimality(
        value=100 * value / total,
        upper=min(100 * upper / total, 100.0),
        paid=total,
        samples=2 * size,
        how=f"exact assignments of {len(whole)} samples to their images, and between halves of {size}",
    )


def _costs(cost: Cost, x: Tensor, y: Tensor) -> Tensor:
    return cost.paired(x, y[matched(cost, x, y)])
