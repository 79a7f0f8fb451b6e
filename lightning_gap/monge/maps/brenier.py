"""Gradients of convex functions: maps that are optimal for the squared Euclidean cost whatever their weights are."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gap.checks import check_choice, check_integer, renamed
from lightning_gap.monge.maps.base import TransportMap
from lightning_gap.monge.maps.conjugate import conjugate_point
from lightning_gap.monge.maps.fitting import fit_images
from lightning_gap.monge.maps.hold_out import choose_share, held_samples, hold_out
from lightning_gap.monge.maps.semidual import fit_semidual
from lightning_gap.monge.maps.starts import (
    BrenierStart,
    PlanStart,
    PlanTargets,
    StartPair,
    check_start,
    fit_steps,
    mean_and_spread,
    sides_of,
)  # fmt: skip
from lightning_gap.monge.ot.costs import Cost, SqEuclidean
from lightning_gap.monge.ot.gaussian import gaussian_map

__all__ = ["BrenierMap"]

_GAUSSIAN_STEPS, _GAUSSIAN_LR = 500, 1e-2
_PLAN_LR, _WARM_UP, _LEAST_STEPS = 3e-2, 100, 400
_NEWTON_STEPS = 50  # of the inverse, at most
_FEW_DIMENSIONS = 32


class BrenierMap(TransportMap):
    r"""The gradient of an input-convex network: optimal for the squared Euclidean cost whatever its weights are.

    .. math::
        T(x) = \nabla \psi(x), \qquad
        \psi(x) = \langle w, z_K(x) \rangle + \tfrac{s}{2} |x|^2 + \langle b, x \rangle, \qquad
        z_k = \sigma\big(C_k z_{k-1} + (Q_k x)^2 + W_k x + b_k\big)

    with :math:`C_k, w, s > 0` and :math:`\sigma` the softplus, so that :math:`\psi` is convex (Amos et al. 2017, "Input
    Convex Neural Networks"; the squares as in Korotin et al. 2021, "Wasserstein-2 Generative Networks"). The gradient
    of a convex function is the optimal map between any source and its image (Brenier 1991), so its Monge gap is zero
    by construction, also beyond the samples, where a gap over a batch of few points in many dimensions sees nothing.
    Only the fitting loss is left to train: ``MongeMap(map=BrenierMap(d), gap_weight=0)``.

    The network sees samples in units of the source's mean and scale, and its gradient is in those of the target, which
    :meth:`start` finds. There is one scale for all features: standardize them where theirs differ much.

    Positive weights are softplus of free parameters, which move on a logarithmic scale: take a larger learning rate
    than for a perceptron, 1e-2 to 3e-2 with Adam, and let it decay.

    The gradient is written out layer by layer: it needs no autograd in the forward pass, so it works without
    gradients, in inference mode, compiled and exported.

    Args:
        dim: Dimension :math:`d` of the samples.
        hidden: Widths of the hidden layers, at least one.
        start: What :meth:`start` fits the map to before the first update: ``"gaussian"``, the Gaussian map between the
            samples; ``"plan"``, the barycentric projection of an entropic plan between all samples (Seguy et al. 2018,
            "Large-Scale Optimal Transport and Mapping Estimation", section 4); ``"identity"`` leaves it near there.
        plan_relative_epsilon: Regularization of the plan, as a share of the mean cost, or of less where most of that is
            the same for all plans: see :class:`EntropicMap`.
        plan_samples: Most samples of each set in a plan: its time grows with their square.
        plan_steps: Most steps of the fit to the plan; fewer samples take fewer.
        plan_draws: Number of plans, on fresh draws, where there are more samples than one takes.
        finish_steps: Steps by the semi-dual after it; in more than 32 dimensions, where Hessians take time, fewer.
        plan_epsilon: Old name of ``plan_relative_epsilon``.

    Raises:
        TypeError: ``hidden`` is no sequence, or a count no integer.
        ValueError: A number is out of range, there is no hidden layer, or the start is not known.

    Example:
        >>> import torch
        >>> from lightning_gap import monge_gap
        >>> x = torch.randn(200, 3)
        >>> net = BrenierMap(3, (16, 16))
        >>> net.start(x, 2 * x + 1)
        >>> bool((net(x).mean(0) - (2 * x + 1).mean(0)).abs().max() < 1e-3)
        True
        >>> bool(monge_gap(x, net(x), solver="exact").abs() < 1e-5)
        True
    """

    center: Tensor
    scale: Tensor
    image_center: Tensor
    image_scale: Tensor
    linear: Tensor
    share: Tensor
    started: Tensor

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (64, 64, 64),
        *,
        start: BrenierStart = "plan",
        plan_relative_epsilon: float = 0.002,
        plan_samples: int = 16_384,
        plan_steps: int = 3000,
        plan_draws: int = 1,
        finish_steps: int = 600,
        plan_epsilon: float | None = None,
    ) -> None:
        check_choice("start", start, get_args(BrenierStart))
        share = renamed("plan_epsilon", "plan_relative_epsilon", plan_epsilon, None)
        share = plan_relative_epsilon if share is None else share
        self.plan_start = PlanStart(share, plan_samples, plan_steps, plan_draws)
        self.finish_steps = check_integer("finish_steps", finish_steps, least=0)
        options = {**self.plan_start.hparams, "finish_steps": finish_steps}
        super().__init__(dim, hidden, "softplus", start=start, **options)
        widths = list(hidden)
        if not widths:
            raise ValueError("a convex potential needs at least one hidden layer, got hidden=(): write hidden=(64, 64)")
        self.widths = widths
        self.starts_at = start
        total = sum(widths)
        self.slopes = nn.Parameter(torch.randn(total, dim) * dim**-0.5)
        self.biases = nn.Parameter(torch.empty(total).uniform_(-1, 1))
        self.squares = nn.Parameter(torch.randn(total, dim) * 0.3 * dim**-0.5)
        # Softplus of these sums to a bit less than 1 over the inputs of a layer.
        self.mixing = nn.ParameterList(_positive(n_out, n_in) for n_in, n_out in pairwise(widths))
        # Loud, so that the fit to the start shares the work; or, with the identity, silent beside a curvature of 1.
        loud, curvature = (-6.0, math.log(math.e - 1)) if start == "identity" else (1.5, -2.0)
        self.last = nn.Parameter(_positive(1, widths[-1])[0].detach() + loud)
        self.curvature = nn.Parameter(torch.tensor(curvature))
        self.offset = nn.Parameter(torch.zeros(dim))
        # Means and scales of source and target, one scale for all features so that the map stays a gradient.
        for prefix in ("", "image_"):
            self.register_buffer(f"{prefix}center", torch.zeros(dim))
            self.register_buffer(f"{prefix}scale", torch.ones(()))
        # The Gaussian map, and how much of the map is the network's rather than that.
        self.register_buffer("linear", torch.eye(dim))
        self.register_buffer("share", torch.ones(()))
        self.register_buffer("started", torch.zeros(()))  # a number, for callbacks that average buffers

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        # Which older states have not: there the network is the map.
        state_dict.setdefault(prefix + "linear", torch.eye(self.dim).to(self.linear))
        state_dict.setdefault(prefix + "share", torch.ones_like(self.share))
        super()._load_from_state_dict(state_dict, prefix, *others)

    @property
    def plan_relative_epsilon(self) -> float:
        """Regularization of the plan, as a share of the mean cost."""
        return self.plan_start.relative_epsilon

    @property
    def plan_epsilon(self) -> float:
        """Old name of ``plan_relative_epsilon``."""
        return self.plan_start.relative_epsilon

    @property
    def hparams(self) -> dict[str, Any]:
        """Plain arguments that make the map again."""
        return {name: value for name, value in (super().hparams or {}).items() if name != "activation"}

    @property
    def made_for(self) -> SqEuclidean:
        """The squared Euclidean cost."""
        return SqEuclidean()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., d)`` samples to ``(..., d)`` samples."""
        self.inputs(x, None)
        image = self.image_scale * self._gradient((x - self.center) / self.scale) + self.image_center
        with torch.autocast(x.device.type, enabled=False):
            gaussian = F.linear(x.to(self.linear.dtype) - self.center, self.linear) + self.image_center
        return (self.share * image + (1 - self.share) * gaussian).to(x.dtype)

    def potential(self, x: Tensor) -> Tensor:
        r"""Return the convex potential :math:`\psi` whose gradient the map is, up to a constant.

        Args:
            x: ``(..., d)`` samples.

        Returns:
            ``(...)`` values, differentiable in the samples and in the weights.
        """
        return self.centred_potential(x) + x @ self.image_center

    def centred_potential(self, x: Tensor) -> Tensor:
        r"""Return :math:`\psi(x) - \langle m_\nu, x \rangle` up to a constant, which is small where means are large."""
        self.inputs(x, None)
        off = x - self.center
        u = off / self.scale
        skips = (F.linear(u, self.squares).square() + F.linear(u, self.slopes, self.biases)).split(self.widths, dim=-1)
        z = F.softplus(skips[0])
        for raw, skip in zip(self.mixing, skips[1:], strict=True):
            z = F.softplus(F.linear(z, F.softplus(raw)) + skip)
        value = z @ F.softplus(self.last) + F.softplus(self.curvature) / 2 * u.square().sum(-1) + u @ self.offset
        gaussian = (F.linear(off, self.linear) * off).sum(-1) / 2
        return self.share * self.scale * self.image_scale * value + (1 - self.share) * gaussian

    def hessian(self, x: Tensor) -> Tensor:
        r"""Return the Jacobian of the map, the potential's Hessian, which is symmetric and positive definite.

        Args:
            x: ``(n, d)`` samples.

        Returns:
            ``(n, d, d)`` matrices.
        """
        self.inputs(x, None)
        u = (x - self.center) / self.scale
        squares = F.linear(u, self.squares)
        skips = (squares.square() + F.linear(u, self.slopes, self.biases)).split(self.widths, dim=-1)
        turns = (2 * squares[..., None] * self.squares + self.slopes).split(self.widths, dim=-2)
        mixing = [F.softplus(raw) for raw in self.mixing]
        rates, jacobians = [torch.sigmoid(skips[0])], [turns[0]]
        z = F.softplus(skips[0])
        for weights, skip, turn in zip(mixing, skips[1:], turns[1:], strict=True):
            jacobians.append(weights @ (rates[-1][..., None] * jacobians[-1]) + turn)
            through = F.linear(z, weights) + skip
            rates.append(torch.sigmoid(through))
            z = F.softplus(through)
        # From the last layer back: the potential's slopes in a layer's values, and in what goes into them.
        outer = F.softplus(self.last).expand_as(rates[-1])
        hessian = F.softplus(self.curvature) * torch.eye(self.dim, dtype=x.dtype, device=x.device)
        for k in range(len(rates) - 1, -1, -1):
            bent = (outer * rates[k] * (1 - rates[k]))[..., None] * jacobians[k]
            hessian = hessian + jacobians[k].mT @ bent
            inner = outer * rates[k]
            start = sum(self.widths[:k])
            own = self.squares[start : start + self.widths[k]]
            hessian = hessian + 2 * own.mT @ (inner[..., None] * own)
            if k:
                outer = inner @ mixing[k - 1]
        return self.share * self.image_scale / self.scale * hessian + (1 - self.share) * self.linear

    @property
    def target_scale(self) -> float:
        """Standard deviation of a feature of the target, over all features."""
        return float(self.image_scale)

    @torch.no_grad()
    def inverse(self, y: Tensor, *, start: Tensor | None = None, tolerance: float = 1e-5) -> Tensor:
        r"""Return the samples whose images are given, at which :math:`\langle x, y \rangle - \psi(x)` is greatest.

        Args:
            y: ``(n, d)`` images.
            start: ``(n, d)`` samples to search from; by default the affine map between the units of the map's data.
            tolerance: Distance of the images from ``y``, as a share of the target's scale, at which the search ends.

        Returns:
            ``(n, d)`` samples. Where the search came no further, its nearest one.
        """
        self.inputs(y, None)
        if start is None:
            start = (y - self.image_center) / self.image_scale * self.scale + self.center
        within = tolerance * float(self.image_scale)
        return conjugate_point(self, self.hessian, y, start, tolerance=within, max_iterations=_NEWTON_STEPS)[0]

    def conjugate(self, y: Tensor) -> Tensor:
        r"""Return :math:`\psi^*(y) = \max_x \langle x, y \rangle - \psi(x)`, differentiable in y and the weights.

        Args:
            y: ``(n, d)`` images.

        Returns:
            ``(n,)`` values. By the envelope theorem their gradient in y is the inverse map.
        """
        x = self.inverse(y.detach())
        return (x * y).sum(-1) - self.potential(x)

    def _gradient(self, x: Tensor) -> Tensor:
        """Return the potential's gradient in the units of the network."""
        squares = F.linear(x, self.squares)
        skips = (squares.square() + F.linear(x, self.slopes, self.biases)).split(self.widths, dim=-1)
        mixing = [F.softplus(raw) for raw in self.mixing]
        z, rates = F.softplus(skips[0]), [torch.sigmoid(skips[0])]
        for k, weights in enumerate(mixing, start=1):
            u = F.linear(z, weights) + skips[k]
            rates.append(torch.sigmoid(u))
            # The last layer's value is not needed: its slope is.
            z = F.softplus(u) if k < len(mixing) else u
        parts = [F.softplus(self.last) * rates[-1]]
        for rate, weights in zip(rates[-2::-1], mixing[::-1], strict=True):
            parts.insert(0, (parts[0] @ weights) * rate)
        through = torch.cat(parts, dim=-1)
        gradient = through @ self.slopes + (2 * squares * through) @ self.squares
        return gradient + F.softplus(self.curvature) * x + self.offset

    def start(
        self, source: Tensor, target: Tensor, *, cost: Cost | None = None, pairs: Sequence[StartPair] | None = None
    ) -> None:
        r"""Fit the map to the images that it starts at, by least squares on random rows of the source.

        The whole network takes part in it. (Starting from an exact Gaussian map, with a network that is almost silent
        beside a quadratic potential, trains far worse.) Once: a map that has started keeps its start.

        Args:
            source: ``(n, d)`` samples.
            target: ``(m, d)`` samples.
            cost: Not heeded: the map is made for the squared Euclidean cost.
            pairs: The samples with their weights, which count in the plan.

        Raises:
            TypeError: An argument is no floating-point tensor.
            ValueError: Shapes do not fit, or values are not finite.
        """
        if self.starts_at == "identity" or bool(self.started):
            return
        (pair,) = check_start(self, source, target, pairs)
        (x, a), (y, w) = sides_of(pair)
        A, b = gaussian_map(x, y, weights=(a, w), shrinkage="auto")
        self._set_units(pair)
        held, rest = hold_out(pair) if self.starts_at == "plan" else (None, pair)
        # A fit to the Gaussian map comes first, so that the plan's need not start far away.
        gaussian = PlanTargets(x, x.double() @ A + b, None)
        with torch.no_grad():
            self.linear.copy_(A)
        if held is None and self.starts_at == "plan":
            with torch.no_grad():  # so few samples tell no more
                self.share.zero_()
        else:
            fit_images(self, gaussian, steps=_GAUSSIAN_STEPS, lr=_GAUSSIAN_LR, warm_up=_WARM_UP)
        if held is not None:
            targets = self.plan_start.targets([rest], SqEuclidean())
            steps = fit_steps(self.plan_start.steps, len(targets.points), least=_LEAST_STEPS)
            fit_images(self, targets, steps=steps, lr=_PLAN_LR, warm_up=_WARM_UP)
            seen = held_samples(held)
            steps = math.ceil(self.finish_steps * min(1, _FEW_DIMENSIONS / self.dim))
            fit_semidual(self, rest.source, rest.target, weights=rest[-2:], held=seen, steps=steps)
            choose_share(self, seen)
        self.started.fill_(1)

    @torch.no_grad()
    def _set_units(self, pair: StartPair) -> None:
        for prefix, side in zip(("", "image_"), sides_of(pair), strict=True):
            center, scale = mean_and_spread(*side)
            getattr(self, f"{prefix}center").copy_(center)
            getattr(self, f"{prefix}scale").copy_(scale)


def _positive(n_out: int, n_in: int) -> nn.Parameter:
    """Return parameters whose softplus is about 0.6 / n_in."""
    return nn.Parameter(0.3 * torch.randn(n_out, n_in) - torch.tensor(float(n_in)).log() - 0.5)
