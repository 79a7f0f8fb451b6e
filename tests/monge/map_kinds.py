"""Every public map of the package, small and started, with a condition where it takes one."""

from typing import NamedTuple

import torch
from monge_runs import gaussians
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_gap import MongeMap
from lightning_gap.monge import (
    MLP,
    BrenierMap,
    ConditionalMap,
    EntropicMap,
    ResidualMLP,
    SphereMap,
    StartPair,
    StructuredMap,
)

HIDDEN = (8, 8)
_PLAN = {"start": "plan", "plan_steps": 5}
_LABELS, _VECTORS = {"num_conditions": 2}, {"condition_dim": 3}

KINDS = {
    "mlp": lambda: MLP(2, HIDDEN, "tanh"),
    "residual": lambda: ResidualMLP(2, HIDDEN),
    "residual, mean": lambda: ResidualMLP(2, HIDDEN, start="mean"),
    "residual, gaussian": lambda: ResidualMLP(2, HIDDEN, start="gaussian"),
    "residual, plan": lambda: ResidualMLP(2, HIDDEN, **_PLAN),
    "brenier": lambda: BrenierMap(2, HIDDEN, **_PLAN, finish_steps=2),
    "brenier, one layer": lambda: BrenierMap(2, (8,), start="identity"),
    "structured": lambda: StructuredMap(2, hidden=HIDDEN, start="gaussian"),
    "structured, pnorm": lambda: StructuredMap(2, "pnorm(p=1.5)", HIDDEN, start="mean"),
    "structured, elastic": lambda: StructuredMap(2, "elastic(lam=0.1)", HIDDEN),
    "structured, mahalanobis": lambda: StructuredMap(2, "mahalanobis(factor=((1.0, 0.5), (0.0, 2.0)))", HIDDEN),
    "structured, potential": lambda: StructuredMap(2, "sqpnorm(p=3)", HIDDEN, "softplus", potential=True, start="mean"),
    "structured, labels": lambda: StructuredMap(2, "pnorm(p=3)", HIDDEN, start="mean", **_LABELS),
    "structured, potential of vectors": lambda: StructuredMap(2, hidden=HIDDEN, potential=True, **_VECTORS),
    "sphere": lambda: SphereMap(3, HIDDEN),
    "sphere, plan": lambda: SphereMap(3, HIDDEN, **_PLAN),
    "sphere, labels": lambda: SphereMap(3, HIDDEN, **_LABELS),
    "conditional, labels": lambda: ConditionalMap(2, HIDDEN, start="gaussian", **_LABELS),
    "conditional, vectors": lambda: ConditionalMap(2, HIDDEN, start="mean", embedding_dim=4, **_VECTORS),
    "entropic": lambda: EntropicMap(2, "pnorm(p=1.5)", relative_epsilon=0.05),
    "entropic, draws": lambda: EntropicMap(2, "euclidean", relative_epsilon=0.05, max_samples=30, draws=3),
    "entropic, labels": lambda: EntropicMap(2, relative_epsilon=0.05, **_LABELS),
    "entropic, not started": lambda: EntropicMap(2),
}


class Started(NamedTuple):
    """A map, the cost that it is for, samples, and their conditions."""

    net: nn.Module
    cost: str
    x: Tensor
    condition: Tensor | None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.x,) if self.condition is None else (self.x, self.condition)


def started(kind: str, dtype: torch.dtype = torch.float32) -> Started:
    """Return a map that is neither the identity nor its start alone."""
    torch.manual_seed(0)
    net = KINDS[kind]()
    sphere = isinstance(net, SphereMap)
    x, y = gaussians(64, net.dim)
    x, y = (normalize(side, dim=-1) for side in (x, y)) if sphere else (x, y)
    labels, vectors = torch.arange(64) % 2, torch.randn(64, 3)
    condition = labels if net.num_conditions else vectors if net.condition_dim else None
    pairs = None
    if net.num_conditions:
        pairs = [StartPair(x[labels == k], y[labels == k], torch.tensor(k)) for k in range(2)]
    if kind != "entropic, not started":
        net.start(x, y, cost=None, pairs=pairs)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    net = net.to(dtype).eval()
    condition = condition.to(dtype) if condition is not None and condition.is_floating_point() else condition
    gaussian = getattr(net, "starts_at", None) == "gaussian"
    cost = "geodesic" if sphere else str(net.made_for or ("sqeuclidean" if gaussian else "euclidean"))
    return Started(net, cost, x.to(dtype), condition)


def model_of(kind: str, dtype: torch.dtype = torch.float32) -> tuple[MongeMap, dict[str, Tensor]]:
    """Return a module with such a map, and the arguments of its ``transport``."""
    made = started(kind, dtype)
    arguments = {"x": made.x} if made.condition is None else {"x": made.x, "condition": made.condition}
    fitting_cost = "geodesic" if made.cost == "geodesic" else "sqeuclidean"
    return MongeMap(cost=made.cost, fitting_cost=fitting_cost, map=made.net).to(dtype), arguments
