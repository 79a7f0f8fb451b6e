"""The semi-dual of a batch: the loss of maps that are gradients of convex potentials."""

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_gap.monge.border import flat
from lightning_gap.monge.maps.semidual import ConvexMap, semidual
from lightning_gap.monge.samples.batches import UnpairedBatch
from lightning_gap.precision import widest
from lightning_gap.ranks.group import RankGroup
from lightning_gap.trainer.strategy import holds_whole_weights, strategy_name

if TYPE_CHECKING:
    from lightning_gap.monge.module import MongeMap

__all__ = ["check_convex", "semidual_loss"]

_METHODS = "potential", "hessian", "inverse"


def check_convex(model: "MongeMap") -> None:
    """Refuse the semi-dual for a map that has no convex potential."""
    if model.objective.fitting_loss != "semidual":
        return
    if not holds_whole_weights(model.trainer):  # potentials and Hessians are computed beside the forward pass
        if model.given.fitting_loss:
            raise MisconfigurationException(
                "fitting_loss='semidual' needs the map's whole weights on each device, and "
                f"{strategy_name(model.trainer)} shards them: give fitting_loss='energy', or strategy='ddp'"
            )
        model.objective = replace(model.objective, fitting_loss="energy")
        model.hparams["fitting_loss"] = "energy"
        return
    if model.map is not None and not all(hasattr(model.map, name) for name in _METHODS):
        raise ValueError(
            f"fitting_loss='semidual' needs a map with a convex potential, and {type(model.map).__name__} has none: "
            "give map=BrenierMap(dim), or fitting_loss='energy'"
        )
    if model.rho is not None or model.conservative_weight:
        raise ValueError(
            "fitting_loss='semidual' is for hard marginals and a potential: leave rho and conservative_weight out, or "
            "give fitting_loss='sinkhorn'"
        )


def semidual_loss(model: "MongeMap", b: UnpairedBatch, group: RankGroup | None = None) -> Tensor:
    r"""Return :math:`S(\psi) - E|x|^2/2 - E|y|^2/2`, minus half the squared distance :math:`W_2^2` at best.

    Of this process's samples: it is a mean, so that the mean over processes is that of all.
    """
    if not isinstance(model.map, torch.nn.Module) or not hasattr(model.map, "potential"):
        raise MisconfigurationException("fitting_loss='semidual' needs a map with a convex potential")
    net = cast(ConvexMap, model.map)
    (x, _), (y, _) = flat(b.source, None), flat(b.target, None)
    shares = [_shares(w, group) for w in (b.source_weights, b.target_weights)]
    with torch.autocast(x.device.type, enabled=False):
        like = next(model.map.parameters())
        x, y = x.to(like.dtype), y.to(like.dtype)
        wide = widest(x.device)
        halves = [_mean(points.to(wide).square().sum(-1) / 2, w) for points, w in zip((x, y), shares, strict=True)]
        return (semidual(net, x, y, weights=(shares[0], shares[1])) - halves[0] - halves[1]).to(x.dtype)


def _mean(values: Tensor, shares: Tensor | None) -> Tensor:
    return values.mean() if shares is None else shares.to(values) @ values


def _shares(weights: Tensor | None, group: RankGroup | None) -> Tensor | None:
    """Return weights whose sum is 1 on average over the processes: of those of each condition, and of all."""
    if weights is None:
        return None
    rows = weights if weights.dim() == 2 else weights[None]
    totals = rows.sum(-1, keepdim=True)
    if group is not None:
        totals = group.sum(totals.detach()) / group.size
    return (rows / totals).flatten() / len(rows)
