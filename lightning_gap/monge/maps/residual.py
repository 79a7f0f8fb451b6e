"""A perceptron that learns the displacement."""

from collections.abc import Sequence

from torch import Tensor

from lightning_gap.monge.maps.base import StartedMap
from lightning_gap.monge.maps.perceptron import Activation
from lightning_gap.monge.maps.starts import PlanStart, Start

__all__ = ["ResidualMLP"]


class ResidualMLP(StartedMap):
    r"""A multi-layer perceptron that learns the displacement, :math:`T(x) = x + \mathrm{net}(x)`.

    The last layer starts at zero, so that the map starts at the identity, whose Monge gap is minimal; or at another
    optimal map, :math:`T(x) = A x + b + \mathrm{net}(x)`, with A and b fixed before the first update.

    Args:
        dim: Dimension :math:`d` of the samples.
        hidden: Widths of the hidden layers.
        activation: Name of the activation between layers (``"gelu"``, ``"silu"``, ``"relu"``, ...), a class of
            ``torch.nn``, or a function that makes a module.
        start: ``"identity"``; ``"mean"``, the translation between the means, optimal for every cost
            :math:`h(x - y)`; ``"gaussian"``, :func:`gaussian_map`, optimal for the squared Euclidean cost only; or
            ``"plan"``, a fit to the images of an entropic plan for the cost that :meth:`start` is given, as by
            :class:`EntropicMap`.
        plan_relative_epsilon: Regularization of the plan, as a share of the mean cost, or of less where most of that is
            the same for all plans: see :class:`EntropicMap`.
        plan_samples: Most samples of each set in a plan: its time grows with their square.
        plan_steps: Most steps of the fit to the plan; fewer samples take fewer.
        plan_draws: Number of plans, on fresh draws, where there are more samples than one takes.

    Raises:
        TypeError: ``hidden`` is no sequence, a number no integer, or ``activation`` makes nothing.
        ValueError: A width is not positive, or a name is not known.

    Example:
        >>> import torch
        >>> x = torch.randn(5, 2)
        >>> torch.equal(ResidualMLP(2)(x), x)
        True
        >>> net = ResidualMLP(2, start="mean")
        >>> net.start(x, x + 3)
        >>> torch.allclose(net(x), x + 3)
        True
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (128, 128, 128),
        activation: Activation = "gelu",
        *,
        start: Start = "identity",
        plan_relative_epsilon: float = 0.01,
        plan_samples: int = 16_384,
        plan_steps: int = 1500,
        plan_draws: int = 1,
    ) -> None:
        plan = PlanStart(plan_relative_epsilon, plan_samples, plan_steps, plan_draws)
        super().__init__(dim, hidden, activation, start, plan)
        self.displacement = self.made_network(hidden, activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, d)`` samples to ``(n, d)`` samples."""
        return self.moved(x, None)

    def moved(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """Return the affine term plus the network's displacement."""
        x, *others = self.inputs(x, condition)
        displacement: Tensor = self.displacement(self.in_units(x), *others)
        if self.starts_at == "plan":
            displacement = self.image_scale.to(displacement.dtype) * displacement
        if self.starts_at == "identity":
            return x + displacement
        affine = self.affine(x, condition)
        return (x + affine if self.starts_at == "mean" else affine) + displacement
