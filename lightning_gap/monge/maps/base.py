"""What the maps of this package have in common, with a start or without."""

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lightning_gap.checks import check_choice
from lightning_gap.monge.maps.affine import affine_of_labels, affinely, for_each_label
from lightning_gap.monge.maps.conditioning import ConditionalPerceptron, Conditioning, check_condition
from lightning_gap.monge.maps.energy_fit import fit_energy, held_out_images, keep_if_nearer
from lightning_gap.monge.maps.fitting import fit_images
from lightning_gap.monge.maps.hold_out import MOST_BY_ENERGY, hold_out
from lightning_gap.monge.maps.perceptron import Activation, activation_factory, check_widths, perceptron
from lightning_gap.monge.maps.potential import PotentialGradient
from lightning_gap.monge.maps.starts import (
    PlanStart,
    Start,
    StartPair,
    affine_start,
    check_start,
    fit_steps,
    mean_and_spread,
    pooled,
    sides_of,
)  # fmt: skip
from lightning_gap.monge.ot.costs import Cost, Euclidean, SqEuclidean

__all__ = ["StartedMap", "TransportMap"]

_PLAN_LR, _WARM_UP = 1e-3, 100
# Images of a plan are noisy, and weights that decay do not follow the noise. A distance's are less smooth.
_DECAY, _DECAY_OF_DISTANCES = 3.0, 1.0


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
    center: Tensor
    scale: Tensor
    image_scale: Tensor
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
            self.register_buffer("offset", self._for_each_label(torch.zeros(dim)))
        if start in ("gaussian", "plan"):
            self.register_buffer("matrix", self._for_each_label(self.matrix_at_identity()))
        if start == "plan":
            self.register_buffer("center", torch.zeros(dim))
            self.register_buffer("scale", torch.ones(()))
            self.register_buffer("image_scale", torch.ones(()))
        if self.num_conditions is not None:
            nn.Module.register_load_state_dict_pre_hook(self, for_each_label)

    def _for_each_label(self, one: Tensor) -> Tensor:
        return one if self.num_conditions is None else one.expand(self.num_conditions, *one.shape).clone()

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
        if with_plan:
            affine = "gaussian" if self.made_for is None or isinstance(cost, SqEuclidean) else "mean"
        every = pooled(parts)
        terms = [affine_start(affine, every)]
        if self.num_conditions is not None:
            own = parts if with_plan or not pairs else check_start(self, source, target, pairs)
            labelled = [part for part in own if part.condition is not None]
            terms = affine_of_labels(affine, labelled, self.num_conditions, terms[0])
        found = [self.affine_term(*term) for term in terms]
        self.offset.copy_(torch.stack([offset for _, offset in found]).view_as(self.offset))
        matrices = [matrix for matrix, _ in found if matrix is not None]
        if matrices:
            self.matrix.copy_(torch.stack(matrices).view_as(self.matrix))
        if with_plan:
            (center, scale), (_, image_scale) = (mean_and_spread(*side) for side in sides_of(every))
            for unit, value in ((self.center, center), (self.scale, scale), (self.image_scale, image_scale)):
                unit.copy_(value)
            self._fit_plan(parts, cost)
        self.started.fill_(1)

    def _fit_plan(self, parts: Sequence[StartPair], cost: Cost) -> None:
        """Fit the network to plans and then to the target, where held-out samples tell this from the affine term."""
        split = [hold_out(part, MOST_BY_ENERGY) for part in parts]
        # A point mass tells no more than the affine term, which sends all to it.
        told = [(held, rest) for held, rest in split if held and bool((rest.target != rest.target[:1]).any())]
        if not told:
            return
        held, rests = [held for held, _ in told], [rest for _, rest in told]
        targets = self.plan_start.targets(rests, cost)
        # Conditions of too few samples keep their affine term, as far as one network can.
        for (aside, rest), image in zip(split, held_out_images(self, [rest for _, rest in split]), strict=True):
            if aside is None and rest.condition is not None:
                targets = targets.joined(rest.source, image, rest.condition)
        steps = fit_steps(self.plan_start.steps, len(targets.points))
        decay = _DECAY_OF_DISTANCES if isinstance(cost, Euclidean) else _DECAY

        def fit() -> None:
            fit_images(self, targets, steps=steps, lr=_PLAN_LR, warm_up=_WARM_UP, weight_decay=decay)
            fit_energy(self, rests, held, cost)

        keep_if_nearer(self, held, fit)

    def in_units(self, x: Tensor) -> Tensor:
        """Return samples about the source's mean, in units of its scale, for a network that starts at a plan."""
        return ((x - self.center) / self.scale).to(x.dtype) if self.starts_at == "plan" else x

    def affine_term(self, A: Tensor | None, b: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return matrix and offset with which the map starts at ``A x + b``, or at ``x + b`` where A is ``None``."""
        return A, b

    def affine(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the matrix times ``x``, if there is one, plus the offset, in full precision under autocast."""
        label = condition if self.num_conditions is not None else None
        return affinely(x, None if self.starts_at == "mean" else self.matrix, self.offset, label)
