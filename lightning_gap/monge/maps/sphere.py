"""Maps of the unit sphere to itself."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import normalize

from lightning_gap.checks import check_choice, renamed
from lightning_gap.monge.maps.base import TransportMap
from lightning_gap.monge.maps.energy_fit import keep_if_nearer
from lightning_gap.monge.maps.fitting import fit_images
from lightning_gap.monge.maps.hold_out import MOST_BY_ENERGY, hold_out
from lightning_gap.monge.maps.perceptron import Activation
from lightning_gap.monge.maps.starts import (
    PlanStart,
    StartPair,
    check_start,
    fit_steps,
    mean_and_spread,
    pooled,
    sides_of,
)
from lightning_gap.monge.ot.costs import Cost, Geodesic

__all__ = ["SphereMap", "circle"]

SphereStart = Literal["identity", "plan"]

_PLAN_LR, _WARM_UP = 2e-3, 50

# Below this square of an angle, its cosine and cardinal sine are those of their series, whose derivatives are finite.
_SMALL = 0.01


class SphereMap(TransportMap):
    r"""A map of the unit sphere to itself, for the geodesic cost: the exponential map of a tangent vector.

    .. math::
        T(x) = \exp_x(v) = \cos(\|v\|)\, x + \frac{\sin \|v\|}{\|v\|}\, v, \qquad
        v = (I - x x^\top)\, \mathrm{net}(x)

    (McCann 2001, "Polar factorization of maps on Riemannian manifolds".) Images are normalized, so that they are on
    the sphere to the last digit. The last layer starts at zero and the map at the identity.

    Args:
        dim: Dimension :math:`d` of the space around the sphere, at least 2: 3 for the globe.
        hidden: Widths of the hidden layers.
        activation: Name of the activation between layers, a class of ``torch.nn``, or a function that makes a module.
        start: ``"identity"``; or ``"plan"``, a fit to the images of an entropic plan for the cost that :meth:`start` is
            given: the Karcher means of :class:`EntropicMap`.
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
        ValueError: A number is not positive, ``dim`` is 1, or a name is not known; and when the map is
            called, a sample is off the unit sphere by more than 1e-3 (1e-2 in half precision).

    Example:
        >>> import torch
        >>> x = torch.nn.functional.normalize(torch.randn(5, 3), dim=-1)
        >>> torch.allclose(SphereMap(3)(x), x)
        True
    """

    started: Tensor
    center: Tensor
    scale: Tensor

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (128, 128, 128),
        activation: Activation = "gelu",
        *,
        start: SphereStart = "identity",
        plan_relative_epsilon: float = 0.005,
        plan_samples: int = 16_384,
        plan_steps: int = 3000,
        plan_draws: int = 1,
        num_conditions: int | None = None,
        condition_dim: int | None = None,
        embedding_dim: int = 32,
        conditions: int | None = None,
    ) -> None:
        num_conditions = renamed("conditions", "num_conditions", conditions, num_conditions)
        kinds = {"num_conditions": num_conditions, "condition_dim": condition_dim, "embedding_dim": embedding_dim}
        check_choice("start", start, get_args(SphereStart))
        self.plan_start = PlanStart(plan_relative_epsilon, plan_samples, plan_steps, plan_draws)
        begins: dict[str, Any] = {"start": start, **self.plan_start.hparams} if start == "plan" else {}
        super().__init__(dim, hidden, activation, **kinds, **begins)
        if dim == 1:
            raise ValueError("dim must be at least 2, got 1: the sphere of R¹ is two points, which no map moves")
        self.starts_at = start
        if start == "plan":
            self.register_buffer("started", torch.zeros(()))  # a number, for callbacks that average buffers
            self.register_buffer("center", torch.zeros(dim))
            self.register_buffer("scale", torch.ones(()))
            nn.Module.register_load_state_dict_pre_hook(self, _raw_inputs)
        self.displacement = self.made_network(hidden, activation, embedding_dim)

    @torch.no_grad()
    def start(
        self, source: Tensor, target: Tensor, *, cost: Cost | None = None, pairs: Sequence[StartPair] | None = None
    ) -> None:
        """Fit the map to the images of plans on the sphere; once, also after a checkpoint.

        Where held-out samples do not tell the fitted map from the identity, or are too few, it stays the identity.

        Args:
            source: ``(n, d)`` unit vectors, of all conditions together.
            target: ``(m, d)`` unit vectors.
            cost: The cost of the plan; the geodesic one by default.
            pairs: The samples of each condition, with its label or vector, and weights: a plan each.

        Raises:
            TypeError: An argument is no floating-point tensor.
            ValueError: Shapes do not fit, values are not finite or off the sphere, or a conditional map that starts at
                plans is given no pairs.
        """
        if self.starts_at == "identity" or bool(self.started):
            return
        cost = cost or Geodesic()
        parts = check_start(self, source, target, pairs)
        for part in parts:
            Geodesic().check_domain("source", part.source)
            Geodesic().check_domain("target", part.target)
        split = [hold_out(part, MOST_BY_ENERGY) for part in parts]
        told = [(held, rest) for held, rest in split if held is not None]
        if told:
            held, rests = [held for held, _ in told], [rest for _, rest in told]
            center, scale = mean_and_spread(*sides_of(pooled(rests))[0])
            self.center.copy_(center)
            self.scale.copy_(scale)
            targets = self.plan_start.targets(rests, cost)
            targets = targets._replace(images=normalize(targets.images, dim=-1))
            steps = fit_steps(self.plan_start.steps, len(targets.points))
            fit = partial(fit_images, self, targets, steps=steps, lr=_PLAN_LR, warm_up=_WARM_UP)
            keep_if_nearer(self, held, fit)
        self.started.fill_(1)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map ``(n, d)`` unit vectors, under their conditions if the map is conditional, to ``(n, d)`` unit vectors."""
        arguments = self.inputs(x, condition)
        # Half precision has no digits for the sphere.
        point = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        norm: Tensor = vector_norm(point, dim=-1, keepdim=True)
        # A compiled or exported graph cannot look at values.
        if not torch.compiler.is_compiling():
            off = ((norm.detach() - 1).abs() > (1e-3 if point is x else 1e-2)).flatten()
            if bool(off.any()):
                raise ValueError(
                    f"x has {int(off.sum())} points off the unit sphere (first at row {int(off.nonzero()[0])}): "
                    "divide the samples by their norm"
                )
        point = point / norm
        if self.starts_at == "plan":  # samples that are close together differ in their units, too
            arguments = (((arguments[0] - self.center) / self.scale).to(x.dtype), *arguments[1:])
        v: Tensor = self.displacement(*arguments).to(point.dtype)
        v = v - (v * point).sum(-1, keepdim=True) * point
        cosine, cardinal_sine = circle(v.square().sum(-1, keepdim=True))
        image = cosine * point + cardinal_sine * v
        length: Tensor = vector_norm(image, dim=-1, keepdim=True)
        return (image / length).to(x.dtype)


def _raw_inputs(module: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    """Give a state of before there were units those in which its network was trained."""
    if f"{prefix}started" in state:
        state.setdefault(f"{prefix}center", torch.zeros_like(module.center))  # type: ignore[arg-type]
        state.setdefault(f"{prefix}scale", torch.ones_like(module.scale))  # type: ignore[arg-type]


def circle(square: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``cos θ`` and ``sin θ / θ`` of an angle's square, smoothly at 0."""
    small = square < _SMALL
    angle = torch.where(small, 1, square).sqrt()
    s = torch.where(small, square, 0)
    cosine = 1 - s / 2 * (1 - s / 12 * (1 - s / 30 * (1 - s / 56 * (1 - s / 90))))
    cardinal_sine = 1 - s / 6 * (1 - s / 20 * (1 - s / 42 * (1 - s / 72 * (1 - s / 110))))
    return torch.where(small, cosine, angle.cos()), torch.where(small, cardinal_sine, angle.sin() / angle)
