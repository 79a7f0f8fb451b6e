"""What the maps of this package have in common, with a start or without."""

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gap.checks import check_choice
from lightning_gap.monge.maps.conditioning import ConditionalPerceptron, Conditioning, check_condition
from lightning_gap.monge.maps.fitting import fit_images
from lightning_gap.monge.maps.perceptron import Activation, activation_factory, check_widths, perceptron
from lightning_gap.monge.maps.potential import PotentialGradient
from lightning_gap.monge.maps.starts import PlanStart, Start, StartPair, affine_start, check_start, fit_steps
from lightning_gap.monge.ot.costs import Cost, SqEuclidean

__all__ = ["StartedMap", "TransportMap"]

_PLAN_LR = 2e-3


class TransportMap(nn.Module):
    """What the maps of this package have in common: their dimension, their arguments, and checks of their inputs."""

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int],
        activation: Activation,
        *,
        num_conditions: int | None = None,
        condition_dim: int | None = None,
        embedding_dim: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_conditions, self.condition_dim = num_conditions, condition_dim
        self.conditional = num_conditions is not None or condition_dim is not None
        name = activation_factory(activation)[1]
        arguments = {"dim": dim, "hidden": list(check_widths(dim, hidden)), "activation": name, **others}
        if embedding_dim is not None:
            arguments |= {"num_conditions": num_conditions, "condition_dim": condition_dim}
            arguments["embedding_dim"] = embedding_dim
        self._hparams = None if name is None or others.get("cost", "") is None else arguments

    def made_network(
        self, hidden: Sequence[int], activation: Activation, embedding_dim: int = 32, *, potential: bool = False
    ) -> nn.Module:
        """Return a network from samples, and perhaps conditions, to vectors, which starts at zero."""
        dim, (factory, name), conditioning = self.dim, activation_factory(activation), None
        if self.conditional:
            kinds = {"num_conditions": self.num_conditions, "condition_dim": self.condition_dim}
            conditioning = Conditioning(hidden, dim, embedding_dim=embedding_dim, **kinds)
        if potential:
            return PotentialGradient(dim, hidden, name, conditioning)
        if conditioning is not None:
            return ConditionalPerceptron(dim, hidden, factory, conditioning)
        return perceptron(dim, hidden, dim, factory, zero=True)

    @property
    def hparams(self) -> dict[str, Any] | None:
        """Plain arguments that make the map again; ``None`` where the activation or the cost is one of your own."""
        return None if self._hparams is None else dict(self._hparams)

    @property
    def made_for(self) -> Cost | None:
        """The cost whose optimal maps have the structure of this map; ``None`` where it suits any."""
        return None

    @property
    def samples_wanted(self) -> int | None:
        """How many samples of a side its start takes, where as many as one likes can be drawn; ``None`` for any."""
        plan = getattr(self, "plan_start", None)
        return plan.samples * plan.draws if plan is not None and getattr(self, "starts_at", None) == "plan" else None

    def start(
        self, source: Tensor, target: Tensor, *, cost: Cost | None = None, pairs: Sequence[StartPair] | None = None
    ) -> None:
        """Find from training samples where the map begins; once, also after a checkpoint.

        Args:
            source: ``(n, d)`` samples, of all conditions together.
            target: ``(m, d)`` samples.
            cost: The cost that the map is to be optimal for, where it is not made for one.
            pairs: The samples of each condition, with its label or vector, and weights.

        Raises:
            TypeError: An argument is no floating-point tensor.
            ValueError: Shapes do not fit, values are not finite, or a conditional map is given no pairs where it needs
                them.
        """

    @property
    def conditions(self) -> int | None:
        """``num_conditions`` by its old name."""
        return self.num_conditions

    def inputs(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, ...]:
        """Return the arguments of the network, or raise ``ValueError`` where they do not fit the map."""
        if x.shape[-1] != self.dim:
            raise ValueError(f"the samples have dimension {x.shape[-1]}, but the map was made with dim={self.dim}")
        if not self.conditional:
            if condition is not None:
                raise ValueError("this map takes no condition: use a conditional one, as ConditionalMap")
            return (x,)
        if condition is None:
            raise ValueError("this map is conditional: give the samples' conditions, as in map(x, condition)")
        check_condition(x, condition, self.num_conditions, self.condition_dim)
        return x, condition


class StartedMap(TransportMap):
    r"""A map whose network learns what an affine term, found from data before the first update, leaves to learn."""

    offset: Tensor
    matrix: Tensor
    started: Tensor

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int],
        activation: Activation,
        start: Start,
        plan: PlanStart | None = None,
        **others: Any,
    ) -> None:
        check_choice("start", start, get_args(Start))
        self.plan_start = PlanStart() if plan is None else plan
        options = self.plan_start.hparams if start == "plan" else {}
        super().__init__(dim, hidden, activation, start=start, **options, **others)
        self.starts_at = start
        if start != "identity":
            # A number: callbacks that average weights average buffers too, and truth values have no average.
            self.register_buffer("started", torch.zeros(()))
            self.register_buffer("offset", torch.zeros(dim))
        if start in ("gaussian", "plan"):
            self.register_buffer("matrix", self.matrix_at_identity())

    def matrix_at_identity(self) -> Tensor:
        """Return the matrix with which the map is the identity."""
        return torch.eye(self.dim)

    @torch.no_grad()
    def start(
        self, source: Tensor, target: Tensor, *, cost: Cost | None = None, pairs: Sequence[StartPair] | None = None
    ) -> None:
        """Set the affine term from training samples, and fit the network to a plan; once, also after a checkpoint.

        Args:
            source: ``(n, d)`` samples, of all conditions together.
            target: ``(m, d)`` samples.
            cost: The cost of the plan, where the map is not made for one; squared Euclidean by default.
            pairs: The samples of each condition, with its label or vector, and weights: a plan each.

        Raises:
            TypeError: An argument is no floating-point tensor.
            ValueError: Shapes do not fit, values are not finite, or a conditional map that starts at plans is given no
                pairs.
        """
        if self.starts_at == "identity" or bool(self.started):
            return
        with_plan = self.starts_at == "plan"
        parts = check_start(self, source, target, pairs, each=with_plan)
        cost = self.made_for or cost or SqEuclidean()
        affine = self.starts_at
        if with_plan:  # the translation is optimal for every cost h(x - y)
            affine = "gaussian" if isinstance(cost, SqEuclidean) else "mean"
        matrix, offset = self.affine_term(*affine_start(affine, source, target))
        targets = self.plan_start.targets(parts, cost) if with_plan else None
        self.offset.copy_(offset)
        if matrix is not None:
            self.matrix.copy_(matrix)
        if targets is not None:
            fit_images(self, targets, steps=fit_steps(self.plan_start.steps, len(targets.points)), lr=_PLAN_LR)
        self.started.fill_(1)

    def affine_term(self, A: Tensor | None, b: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return matrix and offset with which the map starts at ``A x + b``, or at ``x + b`` where A is ``None``."""
        return A, b

    def affine(self, x: Tensor) -> Tensor:
        """Return the matrix times ``x`` plus the offset, in full precision under autocast."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.matrix.dtype), self.matrix, self.offset).to(x.dtype)
