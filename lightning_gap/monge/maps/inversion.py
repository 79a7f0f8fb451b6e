"""Preimages under a map without a closed inverse: damped Gauss-Newton steps, one small problem for each sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from lightning_gap.monge.maps.residual import ResidualMLP
from lightning_gap.monge.maps.structured import StructuredMap
from lightning_gap.precision import widest

__all__ = ["Preimages", "affine_guess", "preimages"]

# Images of points; the second argument tells which of the samples they belong to, for their conditions.
Function = Callable[[Tensor, Tensor], Tensor]

# Jacobians are formed up to this dimension, and multiplied with beyond; so many numbers of them are held at once.
_DENSE, _NUMBERS = 128, 2**22
_ROWS = 65_536
# Shares of the mean squared slope that are added to the normal equations.
_DAMPING, _LEAST, _MOST = 1e-3, 1e-11, 1e8
_KRYLOV_STEPS, _KRYLOV_TOLERANCE = 100, 1e-3
# Further tries, from the preimage of the nearest sample that was solved, the second, the fourth, ... of so many.
_RETRIES, _NEIGHBOURS = 8, 4096


@dataclass(frozen=True)
class Preimages:
    """Where samples came from, as far as it was found.

    Attributes:
        points: ``(n, d)`` points with the smallest residual that was found.
        residuals: ``(n,)`` distances of their images from the samples.
        sizes: ``(n,)`` sizes of samples and displacements, of which the tolerance is a share.
        converged: ``(n,)`` truth values: whether the residual is within the tolerance.
        orientations: ``(n,)`` signs of the map's determinant there, 0 where it was not formed.
    """

    points: Tensor
    residuals: Tensor
    sizes: Tensor
    converged: Tensor
    orientations: Tensor


def preimages(
    function: Function,
    y: Tensor,
    starts: Sequence[Tensor] = (),
    *,
    tolerance: float = 1e-5,
    max_iterations: int = 100,
    on_sphere: bool = False,
) -> Preimages:
    r"""Return points whose images are given samples, by Levenberg's and Marquardt's damped Gauss-Newton steps.

    .. math::
        x \leftarrow x + (J^\top J + \mu I)^{-1} J^\top (y - T(x))

    with the Jacobian J of the map at x. A step that brings the image nearer is kept and :math:`\mu` lowered, another
    one is taken back and :math:`\mu` raised (Nocedal and Wright 2006, "Numerical Optimization", section 10.3). The
    residual is stationary only where it is zero or J is singular, so that with a map that is a local diffeomorphism
    there is nothing to be caught in. Samples that fail are tried again, eight times at most, from the
    preimages of the nearest samples that did not.

    Up to 128 dimensions Jacobians are formed, beyond the normal equations are solved by conjugate gradients.

    Args:
        function: The map, differentiable, row by row: of ``(k, d)`` points and the ``(k,)`` numbers of the samples that
            they belong to.
        y: ``(n, d)`` samples.
        starts: ``(n, d)`` tensors of points to start from, of each sample the best of them; by default ``y`` itself.
        tolerance: Distance of the image that is allowed, as a share of the size of sample and displacement.
        max_iterations: Most steps of a try.
        on_sphere: Whether points stay on the unit sphere.

    Example:
        >>> import torch
        >>> y = torch.randn(5, 2, dtype=torch.float64)
        >>> found = preimages(lambda x, rows: x + x**3, y, tolerance=1e-9)
        >>> bool(found.converged.all()), torch.allclose(found.points + found.points**3, y)
        (True, True)
    """
    with torch.inference_mode(False), torch.no_grad():
        y = y.clone() if y.is_inference() else y.detach()
        n, d = y.shape
        size = min(_ROWS, max(1, _NUMBERS // d**2)) if d <= _DENSE else max(1, _NUMBERS // (16 * d))
        solver = _Solver(function, y, tolerance, max_iterations, on_sphere)
        for rows in torch.arange(n, device=y.device).split(size):
            for start in starts or (y,):
                solver.consider(rows, start[rows])
        solver.measure()
        for rows in torch.arange(n, device=y.device).split(size):
            solver.improve(rows)
        for retry in range(_RETRIES):
            solved, left = solver.converged.nonzero().flatten(), solver.open()
            if not len(solved) or not len(left):
                break
            solved = solved[:: -(-len(solved) // _NEIGHBOURS)]
            for rows in left.split(size):
                distances = torch.cdist(y[rows], y[solved])
                nearest = distances.topk(min(2**retry, len(solved)), largest=False).indices[:, -1]
                solver.improve(rows, solver.points[solved[nearest]])
        return Preimages(
            solver.points, solver.residuals, solver.sizes, solver.converged, solver.orientations.to(torch.int8)
        )


class _Solver:
    """The best points so far, of all samples."""

    def __init__(self, function: Function, y: Tensor, tolerance: float, max_iterations: int, on_sphere: bool) -> None:
        self.function, self.y = function, y
        self.tolerance, self.max_iterations, self.on_sphere = tolerance, max_iterations, on_sphere
        self.points = y.clone()
        self.residuals = y.new_full((len(y),), torch.inf)
        self.first = torch.zeros_like(self.residuals)
        self.sizes = torch.zeros_like(self.residuals)
        self.orientations = torch.zeros_like(self.residuals)

    @property
    def converged(self) -> Tensor:
        """Return which samples are solved."""
        return self.residuals <= self.tolerance * self.sizes

    def open(self) -> Tensor:
        """Return the numbers of the others."""
        return (~self.converged).nonzero().flatten()

    def consider(self, rows: Tensor, points: Tensor) -> None:
        """Start from other points where their images are nearer."""
        points = self._retracted(points.to(self.y))
        residuals = self._distance(self.function(points, rows), rows)
        better = residuals < self.residuals[rows]
        self.points[rows] = torch.where(better[:, None], points, self.points[rows])
        self.residuals[rows] = torch.where(better, residuals, self.residuals[rows])

    def measure(self) -> None:
        """Decide what the tolerance is a share of: no less than what is typical, for samples near zero."""
        displacement = self.residuals.nan_to_num(0, posinf=0)
        sizes = (self.y.square().sum(1) + displacement.square()).sqrt()
        self.sizes = sizes.clamp_min(sizes.median()) if len(sizes) else sizes

    def improve(self, rows: Tensor, start: Tensor | None = None) -> None:
        """Take steps from the best points, or from others, and keep what is better than before."""
        x = self.points[rows] if start is None else start
        images = self.function(x, rows)
        residuals = self._distance(images, rows)
        damping = torch.full_like(residuals, _DAMPING)
        orientations = torch.zeros_like(residuals)
        polished = torch.zeros_like(residuals, dtype=torch.bool)
        for _ in range(self.max_iterations):
            solved = residuals <= self.tolerance * self.sizes[rows]
            here = (~(solved & polished) & (damping < _MOST)).nonzero().flatten()
            if not len(here):
                break
            polished |= solved  # one more step, near a solution, squares what is missing
            step, signs = self._step(x[here], rows[here], damping[here])
            trial = self._retracted(x[here] + step)
            moved = self.function(trial, rows[here])
            distances = self._distance(moved, rows[here])
            better = distances < residuals[here]
            x[here] = torch.where(better[:, None], trial, x[here])
            residuals[here] = torch.where(better, distances, residuals[here])
            orientations[here] = signs
            factor = torch.where(better, 0.1, 10.0)
            damping[here] = (damping[here] * factor).clamp_min(_LEAST)
        better = residuals <= self.residuals[rows]
        self.points[rows] = torch.where(better[:, None], x, self.points[rows])
        self.residuals[rows] = torch.where(better, residuals, self.residuals[rows])
        self.orientations[rows] = torch.where(better, orientations, self.orientations[rows])

    def _distance(self, images: Tensor, rows: Tensor) -> Tensor:
        distance: Tensor = vector_norm(images - self.y[rows], dim=1)
        return distance.nan_to_num(torch.inf, posinf=torch.inf)

    def _retracted(self, x: Tensor) -> Tensor:
        return x / vector_norm(x, dim=1, keepdim=True).clamp_min(1e-30) if self.on_sphere else x

    def _step(self, x: Tensor, rows: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
        """Return the damped step, and the signs of the determinants."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            images = self.function(x, rows)
            if not images.requires_grad:
                raise ValueError("the map has no gradient in its samples, without which it cannot be inverted")
            missing = self.y[rows] - images.detach()
            if x.shape[1] > _DENSE:
                step = _krylov_step(x, images, missing, damping)
                signs = torch.zeros_like(damping)
            else:
                J = _jacobians(x, images)
                if self.on_sphere:  # steps are tangents, and there is no determinant
                    J = J - (J @ x.detach()[:, :, None]) * x.detach()[:, None, :]
                step = _dense_step(J, missing, damping)
                signs = torch.zeros_like(damping) if self.on_sphere else torch.linalg.slogdet(J.float()).sign.to(x)
        if self.on_sphere:
            step = step - (step * x.detach()).sum(1, keepdim=True) * x.detach()
        return step.to(x.dtype), signs


def _jacobians(x: Tensor, images: Tensor) -> Tensor:
    """Return the ``(n, d, d)`` derivatives of images by points."""
    d = images.shape[1]
    rows = [
        torch.autograd.grad(images[:, k].sum(), x, retain_graph=k < d - 1, allow_unused=True, materialize_grads=True)[0]
        for k in range(d)
    ]
    return torch.stack(rows, dim=1)


def _dense_step(J: Tensor, missing: Tensor, damping: Tensor) -> Tensor:
    J, missing, damping = (part.to(widest(J.device)) for part in (J, missing, damping))
    normal = J.mT @ J
    level = normal.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(J.dtype).tiny)
    normal.diagonal(dim1=1, dim2=2).add_((damping * level)[:, None])
    factor, _ = torch.linalg.cholesky_ex(normal)
    step: Tensor = torch.cholesky_solve(J.mT @ missing[:, :, None], factor)[:, :, 0]
    return step


def _krylov_step(x: Tensor, images: Tensor, missing: Tensor, damping: Tensor) -> Tensor:
    """Solve the normal equations by conjugate gradients, with products of the Jacobian alone."""
    dual = torch.zeros_like(images, requires_grad=True)
    (through,) = torch.autograd.grad(images, x, dual, create_graph=True, allow_unused=True, materialize_grads=True)

    def transposed_times(v: Tensor) -> Tensor:
        return torch.autograd.grad(images, x, v, retain_graph=True, allow_unused=True, materialize_grads=True)[0]

    def times(u: Tensor) -> Tensor:  # the derivative of what is linear in the dual
        return torch.autograd.grad(through, dual, u, retain_graph=True, allow_unused=True, materialize_grads=True)[0]

    tiny = torch.finfo(x.dtype).tiny
    residual = transposed_times(missing)
    square = residual.square().sum(1)
    shift = damping * square / missing.square().sum(1).clamp_min(tiny)
    step, direction, enough = torch.zeros_like(residual), residual, _KRYLOV_TOLERANCE**2 * square
    for _ in range(_KRYLOV_STEPS):
        if not bool((square > enough).any()):
            break
        product = transposed_times(times(direction)) + shift[:, None] * direction
        length = square / (direction * product).sum(1).clamp_min(tiny)
        length = torch.where(square > enough, length, 0)[:, None]
        step = step + length * direction
        residual = residual - length * product
        before, square = square, residual.square().sum(1)
        direction = residual + (square / before.clamp_min(tiny))[:, None] * direction
    return step


def affine_guess(net: nn.Module, y: Tensor) -> Tensor | None:
    """Return the preimages under the affine term at which a map has started; ``None`` where it has none."""
    offset, matrix = getattr(net, "offset", None), getattr(net, "matrix", None)
    if offset is None or offset.dim() != 1 or not isinstance(net, ResidualMLP | StructuredMap):
        return None
    if matrix is None:
        return y + net.cost.grad_h_conjugate(offset.to(y)) if isinstance(net, StructuredMap) else y - offset.to(y)
    if isinstance(net, StructuredMap):
        return None
    wide = widest(y.device)
    guess: Tensor = ((y - offset).to(wide) @ torch.linalg.pinv(matrix.to(wide)).mT).to(y)
    return guess
