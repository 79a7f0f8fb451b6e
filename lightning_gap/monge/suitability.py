"""Which costs suit a map, and which cannot be trained with: refused, or said, before training."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_gap.monge.maps.base import StartedMap, TransportMap
from lightning_gap.monge.maps.sphere import SphereMap
from lightning_gap.monge.ot.costs import CallableCost, Cosine, Cost, Geodesic, SqEuclidean, TranslationInvariantCost
from lightning_gap.monge.schedules import counts

if TYPE_CHECKING:
    from lightning_gap.monge.module import MongeMap

__all__ = ["check_costs", "check_run", "modules_of_cost", "refuse_learned_cost", "share_optimal_maps"]

_PROBES = 64
_TOLERANCE = 1e-4


def _check_costs_of_map(net: nn.Module | None, cost: Cost, fitting_cost: Cost, *, gap_counts: bool) -> None:
    """Refuse costs that a map of this package is not made for, and say where one suits it badly."""
    if not isinstance(net, TransportMap):
        return
    kind, dim = type(net).__name__, net.dim
    on_sphere = isinstance(net, SphereMap) or isinstance(net.made_for, Geodesic)
    if not on_sphere:
        for name, given in (("cost", cost), ("fitting_cost", fitting_cost)):
            if isinstance(given, Geodesic):
                raise ValueError(
                    f"{name}={str(given)!r} is a distance on the unit sphere, and {kind} maps off it: "
                    f"take SphereMap, as in MongeMap(map=SphereMap({dim}), {name}={str(given)!r})"
                )
    if not gap_counts:
        return
    made_for = net.made_for
    if made_for is not None and share_optimal_maps(cost, made_for, dim) is False:
        raise ValueError(
            f"{kind} has the structure of the optimal maps for the cost {made_for}, and the gap draws it to those for "
            f"cost={str(cost)!r}: give cost={str(made_for)!r}, or gap_weight=0, or another map such as ResidualMLP"
        )
    flat = _is_of_the_package(cost) and not isinstance(cost, Geodesic)  # a cost of your own may be one on the sphere
    if on_sphere and flat and share_optimal_maps(cost, Cosine(), dim, partial(normalize, dim=-1)) is False:
        rank_zero_warn(
            f"SphereMap moves points along the sphere, and cost={str(cost)!r} is not one on the sphere: give "
            "cost='geodesic' or 'cosine' if the gap is to be that of the sphere"
        )
    starts_at = net.starts_at if isinstance(net, StartedMap) else None
    if starts_at == "gaussian" and made_for is None and share_optimal_maps(cost, SqEuclidean(), dim) is False:
        rank_zero_warn(
            f"{kind}(start='gaussian') starts at the map that is optimal for the cost sqeuclidean, and training has "
            f"to leave it for cost={str(cost)!r}: start='mean' is optimal for every cost h(x - y)"
        )


def check_costs(model: "MongeMap", *, of_checkpoint: bool = False) -> None:
    """Refuse costs that are to be learned, and those that a map is not made for."""
    for name, cost in (("cost", model.cost), ("fitting_cost", model.fitting_cost)):
        refuse_learned_cost(name, cost)
    if not of_checkpoint:
        _check_costs_of_map(model.map, model.cost, model.fitting_cost, gap_counts=counts(model.gap_weight))


def check_run(model: "MongeMap") -> None:
    """Refuse a run that a map cannot be in."""
    net, precision, weight = model.map, model.trainer.precision, model.conservative_weight
    if str(precision) in ("16-true", "bf16-true"):
        raise MisconfigurationException(
            f"precision={precision!r} would round epsilons and the representation to sixteen bits: use 'bf16-mixed' or "
            "'16-mixed', where the network alone is in half precision"
        )
    if net is None:
        raise MisconfigurationException(
            "MongeMap has no network: give dim=, the dimension of the samples, or map=, a network"
        )
    if weight and not isinstance(getattr(net, "field", None), nn.Module):
        raise MisconfigurationException(
            f"conservative_weight={weight:g} regularizes the vector field of a structured map, and "
            f"{type(net).__name__} has none: give map=StructuredMap(...), or conservative_weight=0"
        )


def share_optimal_maps(
    cost: Cost, other: Cost, dim: int, to_domain: Callable[[Tensor], Tensor] | None = None
) -> bool | None:
    r"""Return whether two costs have the same optimal maps, for they are :math:`a\,c(x, y) + f(x) + g(y)` of another.

    Decided at some points, which ``to_domain`` takes to where both are defined, by cross differences, which must be
    proportional; ``None`` where a cost cannot be evaluated there.
    """
    if cost == other:
        return True
    if dim == 1 and isinstance(cost, TranslationInvariantCost) and isinstance(other, TranslationInvariantCost):
        return True  # on the line a monotone map is optimal for every convex function of the displacement
    points = torch.randn(4, _PROBES, dim, generator=torch.Generator().manual_seed(0))
    points = points if to_domain is None else to_domain(points)
    # A cost of the user's own may draw random numbers, and may be made for other points or another precision.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for x, x2, y, y2 in (points.double(), points):
            try:
                mine, its = (
                    (c.paired(x, y) + c.paired(x2, y2) - c.paired(x, y2) - c.paired(x2, y)).double()
                    for c in (cost, other)
                )
            except Exception:
                continue
            ratio = float((mine * its).sum() / its.square().sum())
            return ratio > 0 and bool((mine - ratio * its).abs().max() <= _TOLERANCE * mine.abs().max())
    return None


def _is_of_the_package(cost: Cost) -> bool:
    return not isinstance(cost, CallableCost) and type(cost).__module__.startswith("lightning_gap.")


def refuse_learned_cost(name: str, cost: Cost, points: Tensor | None = None) -> None:
    """Refuse a cost with parameters that require a gradient, seen at a point or, without one, by a search."""
    if _is_of_the_package(cost):
        return
    if points is None:
        tensors = [x for thing in _held(cost) for x in ([thing] if isinstance(thing, Tensor) else thing.parameters())]
        learned = any(tensor.requires_grad for tensor in tensors)
    else:
        x = points[:1].detach()
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            learned = cost.paired(x, x).requires_grad
    if learned:
        raise ValueError(
            f"{name} has parameters that require a gradient, and MongeMap would learn a cost of 0: freeze them, as by "
            "cost.requires_grad_(False) of a module, and train a cost by a loss of your own"
        )


def modules_of_cost(cost: Cost) -> list[nn.Module]:
    """Return the modules that a cost of the user's own is computed by."""
    return [thing for thing in _held(cost) if isinstance(thing, nn.Module)]


def _held(thing: Any, depth: int = 3) -> Iterator[Any]:
    """Yield the modules and tensors that a function or an object holds."""
    if isinstance(thing, nn.Module | Tensor):
        yield thing
        return
    if not depth:
        return
    if isinstance(thing, list | tuple):
        parts = list(thing)
    elif isinstance(thing, dict):
        parts = list(thing.values())
    elif isinstance(thing, partial):
        parts = [thing.func, *thing.args, *thing.keywords.values()]
    elif isinstance(thing, Cost):
        parts = list(vars(thing).values())
    elif callable(thing) and not isinstance(thing, type):
        owner = getattr(thing, "__self__", None)
        parts = [
            # A method of the map's own LightningModule, which is not yet made.
            None if isinstance(owner, LightningModule) else owner,
            getattr(thing, "__func__", None),
            *(getattr(thing, "__defaults__", None) or ()),
            *(cell.cell_contents for cell in getattr(thing, "__closure__", None) or () if _full(cell)),
            *(getattr(thing, "__dict__", None) or {}).values(),
        ]
    else:
        return
    for part in parts:
        yield from _held(part, depth - 1)


def _full(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
