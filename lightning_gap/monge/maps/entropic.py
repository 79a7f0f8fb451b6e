"""The map of an entropic transport plan: nothing is trained."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_gap.checks import check_choice, check_integer, check_number
from lightning_gap.monge.maps.base import TransportMap
from lightning_gap.monge.maps.plan_images import HalfPlan, ImageRule, plan_images, strictly_convex
from lightning_gap.monge.maps.starts import TIE_BREAK, StartPair, check_start, solved_plans
from lightning_gap.monge.ot.checks import check_epsilon
from lightning_gap.monge.ot.costs import CallableCost, Cost, CostLike, Geodesic, resolve

__all__ = ["EntropicMap"]

# One row for each sample of the plans, and one for each plan.
_OF_SAMPLES, _OF_PLANS = ("points", "weights", "potential"), ("epsilons", "ties", "shifts", "sizes")


class EntropicMap(TransportMap):
    r"""The map of an entropic plan between all samples: without training, and for any cost.

    .. math::
        T(x) = x - \nabla h^*\Big(\sum_j p_j(x)\, \nabla h(x - y_j)\Big), \qquad
        p_j(x) \propto b_j \exp\big((g_j - c(x, y_j)) / \varepsilon\big)

    with g the dual potential of the plan, which :meth:`start` solves for, once; it gives an image to every new point
    (Pooladian and Niles-Weed 2021, "Entropic Estimation of Optimal Transport Maps"; Cuturi, Klein and Ablin 2023,
    "Monge, Bregman and Occam", for costs :math:`h(x - y)`). For squared costs :math:`T(x) = \sum_j p_j(x)\, y_j`. For
    the geodesic cost T(x) is the Karcher mean of the :math:`y_j`, and for others without :math:`\nabla h^*`, as the
    Euclidean one, their mean: it is nearer the optimal map than the geometric median and than a step of the mean
    length along the mean direction. A small multiple of its square is added to a distance, so that mass keeps its order
    along a ray, where no order costs more than another.

    There is nothing to train: ``MongeMap(map=EntropicMap(d))`` solves the plan when it is fitted, and the fit ends. The
    map keeps the target's samples, and an image takes their number of steps. Until it has started, it is the identity.

    Args:
        dim: Dimension :math:`d` of the samples.
        cost: The cost of the plan: a name, an instance from :mod:`lightning_gap.costs`, or a function.
        relative_epsilon: Regularization of the plan, as a share of the mean cost; of squared costs of what it is
            between samples that have been moved to one mean. Where the samples of one side are close together beside
            the other's, or both beside the way between them, a share of :math:`4 \sqrt d` standard deviations of the
            part of the cost that differs between plans, which is less.
        epsilon: Regularization in units of the cost; overrides the share.
        max_samples: Most samples of each set in a plan: its time grows with their square.
        draws: Number of plans, on fresh draws, whose images are averaged, where there are more samples than that.
        image: How an image is made of the :math:`y_j`: ``"gradient"``, by the formula above where the cost has
            :math:`\nabla h^*`; or ``"mean"``, as for other costs.
        tie_break: What is added to a distance that is no square, as a share of it at its mean; 0 for none.
        num_conditions: Number K of categories, each with a plan of its own, for labels 0 to K - 1.

    Raises:
        TypeError: A count is no integer, or the cost no cost.
        ValueError: A number is out of range, or a name is not known.

    Example:
        >>> import torch
        >>> x = torch.rand(500, 2)
        >>> net = EntropicMap(2, relative_epsilon=0.01)
        >>> net.start(x, 2 * x + 3)
        >>> new = torch.tensor([[0.4, 0.6]])
        >>> bool((net(new) - (2 * new + 3)).abs().max() < 0.2)
        True
    """

    points: Tensor
    weights: Tensor
    potential: Tensor
    epsilons: Tensor
    ties: Tensor
    shifts: Tensor
    sizes: Tensor
    started: Tensor

    def __init__(
        self,
        dim: int,
        cost: CostLike = "sqeuclidean",
        *,
        relative_epsilon: float = 0.005,
        epsilon: float | None = None,
        max_samples: int = 16_384,
        draws: int = 1,
        image: ImageRule = "gradient",
        tie_break: float = TIE_BREAK,
        num_conditions: int | None = None,
    ) -> None:
        self.relative_epsilon = check_number("relative_epsilon", relative_epsilon, above=0)
        self.epsilon = check_epsilon("epsilon", epsilon)
        self.max_samples, self.draws = check_integer("max_samples", max_samples), check_integer("draws", draws)
        check_choice("image", image, get_args(ImageRule))
        self.tie_break = check_number("tie_break", tie_break, least=0)
        if num_conditions is not None:
            check_integer("num_conditions", num_conditions)
        options: dict[str, Any] = {"relative_epsilon": relative_epsilon, "epsilon": epsilon, "image": image}
        options |= {"max_samples": max_samples, "draws": draws, "tie_break": tie_break}
        resolved = resolve(cost)
        # A cost of the user's own has no name by which it could be made again.
        own = isinstance(resolved, CallableCost) or not type(resolved).__module__.startswith("lightning_gap.")
        named = None if own else str(resolved)
        super().__init__(dim, (), "gelu", num_conditions=num_conditions, cost=named, **options)
        self.cost, self.image = resolved, image
        for name in _OF_SAMPLES + _OF_PLANS:
            shape = (0, dim) if name in ("points", "shifts") else (0,)
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int64 if name == "sizes" else None))
        self.register_buffer("started", torch.zeros(()))  # a number, for callbacks that average buffers
        nn.Module.register_load_state_dict_pre_hook(self, _make_room)

    @property
    def hparams(self) -> dict[str, Any] | None:
        """Plain arguments that make the map again; ``None`` where the cost is one of your own."""
        if (found := super().hparams) is None:
            return None
        found = {name: value for name, value in found.items() if name not in ("hidden", "activation")}
        return found | ({"num_conditions": self.num_conditions} if self.conditional else {})

    @property
    def made_for(self) -> Cost:
        """The cost it was made with."""
        return self.cost

    @property
    def samples_wanted(self) -> int:
        """As many of a side as the plans take."""
        return self.max_samples * self.draws

    @torch.no_grad()
    def start(
        self, source: Tensor, target: Tensor, *, cost: Cost | None = None, pairs: Sequence[StartPair] | None = None
    ) -> None:
        """Solve the plans; once, also after a checkpoint.

        Args:
            source: ``(n, d)`` samples.
            target: ``(m, d)`` samples.
            cost: Not heeded: the map has its own.
            pairs: For a conditional map, the samples of each condition with its label.

        Raises:
            TypeError: An argument is no floating-point tensor.
            ValueError: Shapes do not fit, values are not finite, the cost is not defined at a sample, or a conditional
                map is given no pairs.
        """
        if bool(self.started):
            return
        parts = check_start(self, source, target, pairs)
        options: dict[str, Any] = {"relative_epsilon": self.relative_epsilon, "epsilon": self.epsilon}
        options |= {"most": self.max_samples, "draws": self.draws, "tie_break": self.tie_break}
        plans: list[list[HalfPlan]] = [[] for _ in range(self.num_conditions or 1)]
        for part in parts:
            label = 0 if part.condition is None else int(part.condition)
            plans[label] += [plan for _, plan in solved_plans(part, self.cost, **options)]
        self._keep(plans)

    def _keep(self, plans: Sequence[Sequence[HalfPlan]]) -> None:
        """Take the plans of each condition into the buffers; ``sizes`` has a row for each condition and draw."""
        draws = max(map(len, plans))
        every = [plan for some in plans for plan in some]
        like, none = self.started, self.points.new_zeros(self.dim)
        for name in _OF_SAMPLES:
            setattr(self, name, torch.cat([getattr(plan, name) for plan in every]).to(like))
        sizes = [[len(some[k].points) if k < len(some) else 0 for k in range(draws)] for some in plans]
        self.sizes = torch.tensor(sizes, device=like.device)
        self.epsilons = torch.tensor([plan.epsilon for plan in every]).to(like)
        self.ties = torch.tensor([getattr(plan.cost, "slope", 0.0) for plan in every]).to(like)
        self.shifts = torch.stack([none if plan.shift is None else plan.shift for plan in every]).to(like)
        self.started.fill_(1)

    def _plans(self, dtype: torch.dtype) -> list[list[HalfPlan]]:
        """Return the plans of each condition from the buffers."""
        sizes = self.sizes.tolist()
        numbers = [[size for size in row if size] for row in sizes]
        flat = [size for row in numbers for size in row]
        columns = [getattr(self, name).to(dtype).split(flat) for name in _OF_SAMPLES]
        epsilons, ties, shifts = self.epsilons.tolist(), self.ties.tolist(), self.shifts.to(dtype)
        every = iter(
            HalfPlan(points, weights, potential, epsilons[k], strictly_convex(self.cost, ties[k]), shifts[k])
            for k, (points, weights, potential) in enumerate(zip(*columns, strict=True))
        )
        return [[next(every) for _ in row] for row in numbers]

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map ``(..., d)`` samples, under their labels if the map is conditional, to ``(..., d)`` samples."""
        self.inputs(x, condition)
        if torch.compiler.is_exporting():
            raise NotImplementedError(
                "EntropicMap reads the sizes of its plans from its buffers, which torch.export does not see: export a "
                "network that starts at the plan, as ResidualMLP(dim, start='plan')"
            )
        if not bool(self.started):
            warnings.warn(
                "EntropicMap has no plan yet and is the identity: call start(source, target), or fit it", stacklevel=2
            )
            return x
        half = x.dtype in (torch.float16, torch.bfloat16)
        points = x.to(torch.promote_types(torch.float32 if half else x.dtype, self.points.dtype))
        points = points.reshape(-1, self.dim)
        plans = self._plans(points.dtype)
        if condition is None:
            images = self._image(plans[0], points)
        else:
            labels, images = condition.reshape(-1), points.clone()
            for label in labels.unique().tolist():
                if not plans[label]:
                    raise ValueError(
                        f"condition has the label {label}, of which there was no training sample: this map has a plan "
                        "for each condition it was started with, and knows no other"
                    )
                rows = (labels == label).nonzero().flatten()
                images = images.index_copy(0, rows, self._image(plans[label], points[rows]))
        return images.reshape(x.shape).to(x.dtype)

    def _image(self, plans: Sequence[HalfPlan], x: Tensor) -> Tensor:
        images = torch.stack([plan_images(plan, x, self.cost, self.image) for plan in plans]).mean(0)
        return normalize(images, dim=-1) if isinstance(self.cost, Geodesic) and len(plans) > 1 else images


def _make_room(module: nn.Module, state: Mapping[str, Any], prefix: str, *others: Any) -> None:
    """Give the buffers the sizes of a state that is loaded: that of a plan is known after its start only."""
    _check_plans(module, state, prefix)
    for name in _OF_SAMPLES + _OF_PLANS:
        held, own = state.get(prefix + name), cast(Tensor, getattr(module, name))
        if isinstance(held, Tensor) and held.shape != own.shape:
            setattr(module, name, own.new_zeros(held.shape))


def _check_plans(module: nn.Module, state: Mapping[str, Any], prefix: str) -> None:
    """Refuse a state whose tensors are not of the same plans."""
    names = _OF_SAMPLES + _OF_PLANS
    held = {name: value for name in names if isinstance(value := state.get(prefix + name), Tensor)}
    if len(held) < len(names):
        return  # which loading says
    shapes = {name: tuple(value.shape) for name, value in held.items()}
    sizes = held["sizes"]
    rows, plans = int(sizes.sum()), int((sizes > 0).sum())
    dim, conditions = module.dim, module.num_conditions or 1
    expected = {"points": (rows, dim), "weights": (rows,), "potential": (rows,)}
    expected |= {"epsilons": (plans,), "ties": (plans,), "shifts": (plans, dim)}
    wrong = [name for name, shape in expected.items() if shapes[name] != shape]
    if wrong or bool((sizes < 0).any()) or (rows and (sizes.dim() != 2 or len(sizes) != conditions)):
        raise ValueError(
            f"the state is of no plan in {dim} dimensions with {conditions} condition(s): its tensors have the shapes "
            f"{shapes}, with sizes {sizes.tolist()}"
        )
