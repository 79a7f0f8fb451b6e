"""Maps with the structure that a translation-invariant cost gives to its optimal maps."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gap.checks import renamed
from lightning_gap.monge.maps.base import StartedMap
from lightning_gap.monge.maps.perceptron import Activation
from lightning_gap.monge.maps.starts import PlanStart, Start
from lightning_gap.monge.ot.costs import CostLike, Mahalanobis, SqEuclidean, TranslationInvariantCost, resolve

__all__ = ["StructuredMap"]


class StructuredMap(StartedMap):
    r"""A map with the structure of optimal maps for a cost :math:`c(x, y) = h(x - y)` with strictly convex h.

    .. math::
        T(x) = x - \nabla h^*(F(x))

    The optimal map has this form with F the gradient of a potential (Gangbo and McCann 1996; Uscidda and Cuturi 2023,
    "The Monge Gap", section 4). F is either a free network, ``field``, which :func:`conservativity` draws towards a
    gradient, or the gradient of a scalar network (``potential=True``), written out layer by layer: it needs no
    autograd in the forward pass, so it works without gradients, in inference mode, compiled and exported.

    F starts at zero and the map at the identity. There :math:`\nabla h^*` may be flat or infinitely steep (p-norms, the
    elastic cost's threshold): in training mode, slopes are taken at the nearest regular point (slopes from 0.1 to 10,
    see :meth:`TranslationInvariantCost.regular_point`), while values are always exact. In evaluation mode slopes are
    exact as well.

    Args:
        dim: Dimension :math:`d` of the samples.
        cost: A cost with :math:`\nabla h^*`: ``"sqeuclidean"``, ``"pnorm(p=1.5)"``, ``"sqpnorm(p=3)"``,
            ``"elastic(lam=1)"``, :class:`Mahalanobis` of full column rank, or one of your own.
        hidden: Widths of the hidden layers.
        activation: Name of the activation between layers; for a potential ``"gelu"``, ``"silu"``, ``"softplus"`` or
            ``"tanh"``.
        potential: Whether F is the gradient of a scalar network.
        start: ``"identity"``; ``"mean"``, the translation between the means, which is optimal for every such cost;
            ``"gaussian"``, :func:`gaussian_map`, for the squared Euclidean cost; or ``"plan"``, a fit to the images of
            an entropic plan for the cost, as by :class:`EntropicMap`.
        plan_relative_epsilon: Regularization of the plan, as a share of the mean cost, or of less where most of that is
            the same for all plans: see :class:`EntropicMap`.
        plan_samples: Most samples of each set in a plan: its time grows with their square.
        plan_steps: Most steps of the fit to the plan; fewer samples take fewer.
        plan_draws: Number of plans, on fresh draws, where there are more samples than one takes.
        num_conditions: Number K of categories, for a conditional map of labels 0 to K - 1; or else
        condition_dim: Dimension p of the vectors that are conditions.
        embedding_dim: Width of the condition's embedding.
        conditions: Old name of ``num_conditions``.

    Raises:
        TypeError: ``hidden`` is no sequence, a number no integer, or ``activation`` makes nothing.
        ValueError: The cost has no :math:`\nabla h^*`, the start is not optimal for it, the activation is not smooth
            enough, a number is not positive, or a name is not known.

    Example:
        >>> import torch
        >>> x = torch.randn(5, 2)
        >>> net = StructuredMap(2, "elastic(lam=0.5)", start="mean")
        >>> torch.equal(net(x), x)
        True
        >>> net.start(x, x + torch.tensor([2.0, 0.0]))
        >>> torch.allclose(net(x), x + torch.tensor([2.0, 0.0]))
        True
    """

    slope: Tensor | None

    def __init__(
        self,
        dim: int,
        cost: CostLike = "sqeuclidean",
        hidden: Sequence[int] = (128, 128, 128),
        activation: Activation = "gelu",
        *,
        potential: bool = False,
        start: Start = "identity",
        plan_relative_epsilon: float = 0.005,
        plan_samples: int = 16_384,
        plan_steps: int = 3000,
        plan_draws: int = 1,
        num_conditions: int | None = None,
        condition_dim: int | None = None,
        embedding_dim: int = 32,
        conditions: int | None = None,
    ) -> None:
        resolved = resolve(cost)
        if not isinstance(resolved, TranslationInvariantCost):
            raise ValueError(
                f"cost {resolved} is no function h(x - y), so its optimal maps do not have this structure: "
                "use ResidualMLP, or SphereMap for the geodesic cost"
            )
        if start == "gaussian" and not isinstance(resolved, SqEuclidean):
            raise ValueError(
                f"start='gaussian' is optimal for the cost sqeuclidean only, got {resolved}: use start='mean'"
            )
        num_conditions = renamed("conditions", "num_conditions", conditions, num_conditions)
        kinds = {"num_conditions": num_conditions, "condition_dim": condition_dim, "embedding_dim": embedding_dim}
        # A cost of the user's own has no name by which it could be made again.
        name = str(resolved) if type(resolved).__module__.startswith("lightning_gap.") else None
        plan = PlanStart(plan_relative_epsilon, plan_samples, plan_steps, plan_draws)
        super().__init__(dim, hidden, activation, start, plan, cost=name, potential=potential, **kinds)
        self.cost = resolved
        if isinstance(resolved, Mahalanobis) and len(resolved.factor[0]) != dim:
            raise ValueError(
                f"the map was made with dim={dim}, but the factor of its cost has {len(resolved.factor[0])} columns: "
                "they must agree"
            )
        try:
            probe = resolved.grad_h_conjugate(torch.eye(dim))
        except NotImplementedError as error:
            raise ValueError(f"{error}, so no map is structured by it: use ResidualMLP") from error
        # Of this cost ∇h* is linear: its matrix is found once.
        self.register_buffer("slope", probe if isinstance(resolved, Mahalanobis) else None, persistent=False)
        self.field = self.made_network(hidden, activation, embedding_dim, potential=potential)

    @property
    def made_for(self) -> TranslationInvariantCost:
        """The cost it was made with."""
        return self.cost

    def matrix_at_identity(self) -> Tensor:
        """Return zeros, with which F is zero."""
        return torch.zeros(self.dim, self.dim)

    def affine_term(self, A: Tensor | None, b: Tensor) -> tuple[Tensor | None, Tensor]:
        r"""Return the affine part of F, :math:`\nabla h(x - A x - b)`."""
        if A is not None:
            return 2 * (torch.eye(self.dim).to(A) - A), -2 * b
        with torch.enable_grad():
            z = (-b).requires_grad_()
            return None, torch.autograd.grad(self.cost.h(z), z)[0]

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map ``(n, d)`` samples, under their conditions if the map is conditional, to ``(n, d)`` samples."""
        w = self.field(*self.inputs(x, condition)).to(x.dtype)
        if self.starts_at != "identity":
            w = w + self.affine(x, condition)
        return x - self._displacement(w)

    def _displacement(self, w: Tensor) -> Tensor:
        if self.slope is not None:
            with torch.autocast(w.device.type, enabled=False):
                displacement: Tensor = w @ self.slope.to(w.dtype)
            return displacement
        if not self.training:
            return self.cost.grad_h_conjugate(w)
        # The value at w and the slope at the regular point: both differences are zero.
        exact = self.cost.grad_h_conjugate(w.detach())
        near = self.cost.grad_h_conjugate(w + (self.cost.regular_point(w) - w).detach())
        return exact + (near - near.detach())
