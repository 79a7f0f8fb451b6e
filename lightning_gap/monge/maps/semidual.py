"""The semi-dual of optimal transport: an unbiased loss for gradients of convex functions."""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_gap.monge.maps.conjugate import conjugate_point
from lightning_gap.monge.maps.descent import drawn_rows, minimize
from lightning_gap.precision import widest

__all__ = [
    "ConvexMap", "HeldOutSamples", "SemidualValues", "difference", "fit_semidual", "mean_semidual", "semidual",
    "semidual_values",
]  # fmt: skip

_LOOKS, _WARM_UP = 12, 50
# In few dimensions the noise of steps is what is left; in many, Hessians take time.
_LR, _MOST_LR, _BATCH, _LEAST_BATCH = 2e-3, 1e-2, 2048, 64
# Of the target's scale: residuals of conjugate points in training, where what is left is a second-order error.
_TRAINED, _EXACT = 1e-3, 1e-4
_BLOCK = 4096  # rows of products with all points
_MOST_KEPT = 131_072  # target samples whose conjugate points are found and kept


class ConvexMap(Protocol):
    """A map that is the gradient of a strictly convex potential."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the gradient."""

    center: Tensor
    image_center: Tensor

    def centred_potential(self, x: Tensor) -> Tensor:
        """Return the potential less its part along the target's center, up to a constant."""

    def hessian(self, x: Tensor) -> Tensor:
        """Return its Hessians."""

    def inverse(self, y: Tensor, *, start: Tensor | None = None, tolerance: float = 1e-5) -> Tensor:
        """Return the points with these gradients."""

    @property
    def target_scale(self) -> float:
        """Standard deviation of a feature of the target."""


class HeldOutSamples(NamedTuple):
    """``(n, d)`` and ``(m, d)`` samples that a map is not fitted to, and their weights."""

    source: Tensor
    target: Tensor
    weights: tuple[Tensor | None, Tensor | None] = (None, None)


class SemidualValues(NamedTuple):
    """The centred potential at each source sample, and its conjugate at each target sample."""

    potential: Tensor
    conjugate: Tensor


def semidual(
    net: ConvexMap, x: Tensor, y: Tensor, *, weights: tuple[Tensor | None, Tensor | None] = (None, None)
) -> Tensor:
    r"""Return the semi-dual of a convex potential, which the optimal one alone makes least.

    .. math::
        S(\psi) = E_\mu \psi + E_\nu \psi^*, \qquad \psi^*(y) = \max_x \langle x, y \rangle - \psi(x)

    For a potential whose gradient is Lipschitz with constant :math:`\beta`, :math:`E |\nabla\psi - T^*|^2 \le
    2 \beta (S(\psi) - \min S)`. A mean over samples, so that a batch's is unbiased: no divergence between samples,
    and no regularization, comes into it (Makkuva et al. 2020, "Optimal transport mapping via input convex neural
    networks"; the conjugate solved as in Amos 2023, "On amortizing convex conjugates for optimal transport").

    Args:
        net: The map, with its potential and its inverse.
        x: ``(n, d)`` source samples.
        y: ``(m, d)`` target samples.
        weights: ``(n,)`` and ``(m,)`` weights of the means; uniform by default.

    Returns:
        A scalar, differentiable in the weights (by the envelope theorem).

    Example:
        >>> import torch
        >>> from lightning_gap.monge import BrenierMap
        >>> x = torch.randn(200, 2)
        >>> net = BrenierMap(2, (16, 16))
        >>> net.start(x, 2 * x)
        >>> loss = semidual(net, x, 2 * x)  # E|x|² + E|2 x|²/4 at best
        >>> bool((loss - 2 * x.square().sum(1).mean()).abs() < 0.1)
        True
    """
    found = _conjugate_points(net, y, _nearest(net, x, y), tolerance=_TRAINED, steps=20)
    # Large means make large values: they are put back in double.
    wide = [part.to(widest(part.device)) for part in (x, y, net.center, net.image_center)]
    values = (
        net.centred_potential(x) + wide[0] @ wide[3],
        _conjugate(net, y, found) + wide[1] @ wide[2] - wide[2] @ wide[3],
    )
    means = [v.mean() if w is None else w.to(v) @ v for v, w in zip(values, weights, strict=True)]
    return means[0] + means[1]


def _conjugate(net: ConvexMap, y: Tensor, points: Tensor) -> Tensor:
    """Return the conjugate of the centred potential, which is attained at the points."""
    return ((points - net.center) * (y - net.image_center)).sum(-1) - net.centred_potential(points)


@torch.no_grad()
def _nearest(net: ConvexMap, x: Tensor, y: Tensor) -> Tensor:
    """Return for each y the one of the points x at which its conjugate is greatest."""
    values, off = net.centred_potential(x), x - net.center
    best = [((part - net.image_center) @ off.mT - values).argmax(1) for part in y.split(_BLOCK)]
    return x[torch.cat(best)]


def _conjugate_points(net: ConvexMap, y: Tensor, start: Tensor, *, tolerance: float, steps: int) -> Tensor:
    within = tolerance * net.target_scale
    return conjugate_point(net, net.hessian, y, start, tolerance=within, max_iterations=steps)[0]


@torch.no_grad()
def semidual_values(net: ConvexMap, x: Tensor, y: Tensor) -> SemidualValues:
    """Return the potential and its conjugate at each of the samples, whose means make the semi-dual."""
    found = _conjugate_points(net, y, net.inverse(y, tolerance=_EXACT), tolerance=_EXACT, steps=30)
    return SemidualValues(net.centred_potential(x), _conjugate(net, y, found))


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    values = values.double()
    return values.mean() if weights is None else (weights.double() @ values) / weights.double().sum()


def mean_semidual(values: SemidualValues, held: HeldOutSamples) -> float:
    """Return the semi-dual of held-out samples."""
    return float(_mean(values.potential, held.weights[0]) + _mean(values.conjugate, held.weights[1]))


def difference(values: SemidualValues, others: SemidualValues, held: HeldOutSamples) -> tuple[float, float]:
    """Return by how much one semi-dual is above another on the same samples, and the standard error of that."""
    mean, variance = 0.0, 0.0
    for ours, theirs, weights in zip(values, others, held.weights, strict=True):
        off = (ours - theirs).double()
        w = torch.full_like(off, 1 / len(off)) if weights is None else weights.double() / weights.double().sum()
        center = w @ off
        mean += float(center)
        variance += float(w.square() @ (off - center).square())
    return mean, math.sqrt(variance)


def fit_semidual(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    weights: tuple[Tensor | None, Tensor | None] = (None, None),
    held: HeldOutSamples | None = None,
    steps: int,
    lr: float | None = None,
    batch: int | None = None,
) -> None:
    """Minimize the semi-dual of all samples by Adam with a cosine decay, and keep what held-out ones favour.

    The points where conjugates are attained are kept for each target sample, and moved by a Newton step or two when it
    is drawn again; beyond 131,072 of them, for as many random ones. Random rows come from a generator of its own.
    """
    like, dim = next(p for p in net.parameters() if p.requires_grad), x.shape[1]
    lr = min(_LR * dim**0.5, _MOST_LR) if lr is None else lr
    size = _default_batch(dim) if batch is None else batch
    x, y = x.detach().to(like), y.detach().to(like)
    convex: ConvexMap = net  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    if len(y) > _MOST_KEPT:
        if weights[1] is None:  # each at most once
            kept = torch.randperm(len(y), generator=generator)[:_MOST_KEPT].to(y.device)
        else:
            kept = drawn_rows(y, weights[1], _MOST_KEPT, generator)
        y, weights = y[kept], (weights[0], None)  # which the draw has heeded
    unit = max(float(convex.target_scale), 1e-30) * max(float((x - x.mean(0)).square().mean().sqrt()), 1e-30)
    points = convex.inverse(y, tolerance=_TRAINED)

    def loss(step: int) -> Tensor:
        i, j = (drawn_rows(side, w, size, generator) for side, w in zip((x, y), weights, strict=True))
        points[j] = _conjugate_points(convex, y[j], points[j], tolerance=_TRAINED, steps=2)
        return (convex.centred_potential(x[i]).mean() - convex.centred_potential(points[j]).mean()) / unit

    better = None
    if held is not None:
        better = _lower(convex, HeldOutSamples(held.source.to(like), held.target.to(like), held.weights))
    minimize(net, loss, steps=steps, lr=lr, warm_up=_WARM_UP - 1, better=better, looks=_LOOKS)


@torch.no_grad()
def _lower(net: ConvexMap, held: HeldOutSamples) -> Callable[[], bool]:
    """Return what tells whether the held-out semi-dual is lower than ever, from now on."""
    seen, best = net.inverse(held.target, tolerance=_EXACT), math.inf

    def lower() -> bool:
        nonlocal seen, best
        seen = _conjugate_points(net, held.target, seen, tolerance=_EXACT, steps=20)
        values = SemidualValues(net.centred_potential(held.source), _conjugate(net, held.target, seen))
        now, before = mean_semidual(values, held), best
        best = min(now, best)
        return now < before

    lower()
    return lower


def _default_batch(dim: int) -> int:
    """Return the size of a step: samples are cheap in few dimensions, and noise is what is left to lose."""
    return max(_LEAST_BATCH, min(_BATCH, max(4 * _BATCH // dim, min(_BATCH // 4, 8 * _BATCH // dim))))
