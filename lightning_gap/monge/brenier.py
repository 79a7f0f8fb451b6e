"""Gradients of convex functions: maps that are optimal for the squared Euclidean cost whatever their weights are."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gap.monge.gaussian import gaussian_map
from lightning_gap.monge.maps import TransportMap
from lightning_gap.monge.samples import check_pair

__all__ = ["BrenierMap"]

_START_STEPS, _START_LR = 500, 5e-3


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
        start: Whether :meth:`start` moves the map to the Gaussian map between the samples; otherwise it starts near
            the identity.

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

    def __init__(self, dim: int, hidden: Sequence[int] = (64, 64, 64), *, gaussian_start: bool = True) -> None:
        super().__init__(dim, hidden, "softplus", gaussian_start=gaussian_start)
        widths = list(hidden)
        if not widths:
            raise ValueError("a convex potential needs at least one hidden layer, got hidden=(): write hidden=(64, 64)")
        del self._hparams["activation"]
        self.widths = widths
        self.gaussian_start = bool(gaussian_start)
        total = sum(widths)
        self.slopes = nn.Parameter(torch.randn(total, dim) * dim**-0.5)
        self.biases = nn.Parameter(torch.empty(total).uniform_(-1, 1))
        self.squares = nn.Parameter(torch.randn(total, dim) * 0.3 * dim**-0.5)
        # Softplus of these sums to a bit less than 1 over the inputs of a layer.
        self.mixing = nn.ParameterList(_positive(n_out, n_in) for n_in, n_out in zip(widths, widths[1:], strict=False))
        self.last = nn.Parameter(_positive(1, widths[-1])[0] + 1.5)
        self.curvature = nn.Parameter(torch.tensor(-2.0))
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
        r"""Fit the map to the Gaussian map between the samples, by least squares on random rows of the source.

        The whole network takes part in it. (Starting from an exact Gaussian map, with a network that is almost
        silent beside a quadratic potential, trains far worse.)

        Args:
            source: ``(n, d)`` samples.
            target: ``(m, d)`` samples.

        Raises:
            TypeError: An argument is no floating-point tensor.
            ValueError: Shapes do not fit, or values are not finite.
        """
        if not self.gaussian_start or bool(self.started):
            return
        check_pair("source", source, "target", target)
        self.inputs(source, None)
        A, b = gaussian_map(source, target, shrinkage="auto")
        source = source.to(self.slopes.dtype)
        images = (source.double() @ A + b).to(source.dtype)
        optimizer = torch.optim.Adam(self.parameters(), lr=_START_LR)
        generator = torch.Generator().manual_seed(0)
        with torch.enable_grad(), torch.inference_mode(False):
            for step in range(_START_STEPS):
                optimizer.param_groups[0]["lr"] = _START_LR * max(0.02, 1 - step / _START_STEPS)
                rows = torch.randint(len(source), (512,), generator=generator).to(source.device)
                loss = (self(source[rows]) - images[rows]).square().sum(-1).mean()
                gradients = torch.autograd.grad(loss, list(self.parameters()))
                for parameter, gradient in zip(self.parameters(), gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
        for parameter in self.parameters():
            parameter.grad = None
        self.started.fill_(True)


def _positive(n_out: int, n_in: int) -> nn.Parameter:
    """Return parameters whose softplus is about 0.6 / n_in."""
    return nn.Parameter(0.3 * torch.randn(n_out, n_in) - torch.tensor(float(n_in)).log() - 0.5)
