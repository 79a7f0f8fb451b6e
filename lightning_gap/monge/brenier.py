"""Gradients of convex functions: maps that are optimal for the squared Euclidean cost whatever their weights are."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gap.monge.arguments import check_count
from lightning_gap.monge.gaussian import gaussian_map
from lightning_gap.monge.maps import TransportMap
from lightning_gap.monge.samples import check_epsilon, check_pair
from lightning_gap.monge.sinkhorn import optimal_transport

__all__ = ["BrenierMap", "BrenierStart"]

BrenierStart = Literal["identity", "gaussian", "plan"]

_GAUSSIAN_STEPS, _GAUSSIAN_LR = 500, 1e-2
_PLAN_LR, _PLAN_TOLERANCE = 3e-2, 1e-2


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
        plan_epsilon: Regularization of the plan, as a share of the mean cost.
        plan_samples: Most samples of each set in the plan: its time grows with their square.
        plan_steps: Steps of the fit to the plan.

    Raises:
        TypeError: ``hidden`` is no sequence.
        ValueError: A width is not a positive integer, or there is no hidden layer.

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

    started: Tensor

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (64, 64, 64),
        *,
        start: BrenierStart = "gaussian",
        plan_epsilon: float = 0.002,
        plan_samples: int = 16_384,
        plan_steps: int = 3000,
    ) -> None:
        if start not in get_args(BrenierStart):
            raise ValueError(f"start must be one of {', '.join(get_args(BrenierStart))}, got {start!r}")
        check_epsilon("plan_epsilon", plan_epsilon)
        check_count("plan_samples", plan_samples)
        check_count("plan_steps", plan_steps)
        plan = {"plan_epsilon": plan_epsilon, "plan_samples": plan_samples, "plan_steps": plan_steps}
        super().__init__(dim, hidden, "softplus", start=start, **plan)
        widths = list(hidden)
        if not widths:
            raise ValueError("a convex potential needs at least one hidden layer, got hidden=(): write hidden=(64, 64)")
        del self._hparams["activation"]
        self.widths = widths
        self.starts_at = start
        self.plan_epsilon, self.plan_samples, self.plan_steps = plan_epsilon, plan_samples, plan_steps
        total = sum(widths)
        self.slopes = nn.Parameter(torch.randn(total, dim) * dim**-0.5)
        self.biases = nn.Parameter(torch.empty(total).uniform_(-1, 1))
        self.squares = nn.Parameter(torch.randn(total, dim) * 0.3 * dim**-0.5)
        # Softplus of these sums to a bit less than 1 over the inputs of a layer.
        self.mixing = nn.ParameterList(_positive(n_out, n_in) for n_in, n_out in zip(widths, widths[1:], strict=False))
        # Loud, so that the fit to the start shares the work; or, with the identity, silent beside a curvature of 1.
        loud, curvature = (-6.0, math.log(math.e - 1)) if start == "identity" else (1.5, -2.0)
        self.last = nn.Parameter(_positive(1, widths[-1])[0].detach() + loud)
        self.curvature = nn.Parameter(torch.tensor(curvature))
        self.offset = nn.Parameter(torch.zeros(dim))
        self.register_buffer("started", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., d)`` samples to ``(..., d)`` samples."""
        self.inputs(x, None)
        return self._gradient(x) + F.softplus(self.curvature) * x + self.offset

    def _gradient(self, x: Tensor) -> Tensor:
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
        return through @ self.slopes + (2 * squares * through) @ self.squares

    def start(self, source: Tensor, target: Tensor) -> None:
        r"""Fit the map to the images that it starts at, by least squares on random rows of the source.

        The whole network takes part in it. (Starting from an exact Gaussian map, with a network that is almost silent
        beside a quadratic potential, trains far worse.) Once: a map that has started keeps its start.

        Args:
            source: ``(n, d)`` samples.
            target: ``(m, d)`` samples.

        Raises:
            TypeError: An argument is no floating-point tensor.
            ValueError: Shapes do not fit, or values are not finite.
        """
        if self.starts_at == "identity" or bool(self.started):
            return
        check_pair("source", source, "target", target)
        self.inputs(source, None)
        dtype = self.slopes.dtype
        # A fit to the Gaussian map comes first: its images are near, and it sets the scales.
        A, b = gaussian_map(source, target, shrinkage="auto")
        self._fit(source.to(dtype), (source.double() @ A + b).to(dtype), _GAUSSIAN_STEPS, _GAUSSIAN_LR)
        if self.starts_at == "plan":
            x, y = (_some(samples, self.plan_samples) for samples in (source, target))
            plan = optimal_transport(x, y, relative_epsilon=self.plan_epsilon, tolerance=_PLAN_TOLERANCE)
            self._fit(x.to(dtype), plan.barycentric_projection().to(dtype), self.plan_steps, _PLAN_LR)
        self.started.fill_(True)

    def _fit(self, x: Tensor, images: Tensor, steps: int, lr: float) -> None:
        """Minimize the mean squared distance of the images."""
        parameters = list(self.parameters())
        optimizer = torch.optim.Adam(parameters, lr=lr)
        generator = torch.Generator().manual_seed(0)
        with torch.inference_mode(False), torch.enable_grad():
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2
                rows = torch.randint(len(x), (512,), generator=generator).to(x.device)
                loss = (self(x[rows]) - images[rows]).square().sum(-1).mean()
                for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                    parameter.grad = gradient
                optimizer.step()
        for parameter in parameters:
            parameter.grad = None


def _some(samples: Tensor, most: int) -> Tensor:
    """Return at most so many of the samples, drawn at random."""
    if len(samples) <= most:
        return samples
    return samples[torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[:most].to(samples.device)]


def _positive(n_out: int, n_in: int) -> nn.Parameter:
    """Return parameters whose softplus is about 0.6 / n_in."""
    return nn.Parameter(0.3 * torch.randn(n_out, n_in) - torch.tensor(float(n_in)).log() - 0.5)
