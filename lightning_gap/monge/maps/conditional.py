"""One map for many conditions."""

from collections.abc import Sequence

from torch import Tensor

from lightning_gap.checks import renamed
from lightning_gap.monge.maps.base import StartedMap
from lightning_gap.monge.maps.perceptron import Activation
from lightning_gap.monge.maps.residual import ResidualMLP
from lightning_gap.monge.maps.starts import PlanStart, Start

__all__ = ["ConditionalMap"]


class ConditionalMap(ResidualMLP):
    r"""A map of sample and condition with one shared network, :math:`T(x \mid c) = x + \mathrm{net}(x, c)`.

    The condition is a label (a drug, a cell type) or a vector (a dose, an embedding of a molecule), and modulates every
    hidden layer (Perez et al. 2018, "FiLM"). The map starts at the identity, or another start, whatever the condition.

    Args:
        dim: Dimension :math:`d` of the samples.
        hidden: Widths of the hidden layers.
        activation: Name of the activation between layers, a class of ``torch.nn``, or a function that makes a module.
        num_conditions: Number K of categories: they are labels 0 to K - 1. Or else
        condition_dim: Dimension p of the vectors that are conditions.
        embedding_dim: Width of the condition's embedding.
        start: As in :class:`ResidualMLP`; each label has the affine term of its own samples, vectors share that of all,
            and ``"plan"`` solves a plan for each condition.
        plan_relative_epsilon: Regularization of the plan, as a share of the mean cost, or of less where most of that is
            the same for all plans: see :class:`EntropicMap`.
        plan_samples: Most samples of each set in a plan: its time grows with their square.
        plan_steps: Most steps of the fit to the plan; fewer samples take fewer.
        plan_draws: Number of plans, on fresh draws, where there are more samples than one takes.
        conditions: Old name of ``num_conditions``.

    Raises:
        TypeError: ``hidden`` is no sequence, a number no integer, or ``activation`` makes nothing.
        ValueError: Not just one of ``num_conditions`` and ``condition_dim`` is given, a number is not positive, or a
            name is not known.

    Example:
        >>> import torch
        >>> drug, dose = ConditionalMap(2, num_conditions=3), ConditionalMap(2, condition_dim=1)
        >>> x = torch.randn(5, 2)
        >>> drug(x, torch.tensor([0, 0, 1, 2, 2])).shape, dose(x, torch.rand(5, 1)).shape
        (torch.Size([5, 2]), torch.Size([5, 2]))
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (128, 128, 128),
        activation: Activation = "gelu",
        *,
        num_conditions: int | None = None,
        condition_dim: int | None = None,
        embedding_dim: int = 32,
        start: Start = "identity",
        plan_relative_epsilon: float = 0.01,
        plan_samples: int = 16_384,
        plan_steps: int = 1500,
        plan_draws: int = 1,
        conditions: int | None = None,
    ) -> None:
        num_conditions = renamed("conditions", "num_conditions", conditions, num_conditions)
        if num_conditions is None and condition_dim is None:
            raise ValueError("give num_conditions=, the number of categories, or condition_dim=, that of vectors")
        kinds = {"num_conditions": num_conditions, "condition_dim": condition_dim, "embedding_dim": embedding_dim}
        plan = PlanStart(plan_relative_epsilon, plan_samples, plan_steps, plan_draws)
        StartedMap.__init__(self, dim, hidden, activation, start, plan, **kinds)
        self.displacement = self.made_network(hidden, activation, embedding_dim)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map ``(n, d)`` samples under their ``(n,)`` labels or ``(n, p)`` vectors to ``(n, d)`` samples."""
        return self.moved(x, condition)
