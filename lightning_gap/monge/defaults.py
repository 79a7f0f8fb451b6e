"""What a MongeMap takes where it was not told: the map, the loss, the weight of the gap and the learning rate."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lightning_gap.monge.border import on_device
from lightning_gap.monge.checkpoint import build, describe, described_map
from lightning_gap.monge.maps.brenier import BrenierMap
from lightning_gap.monge.maps.conditional import ConditionalMap
from lightning_gap.monge.maps.perceptron import check_widths
from lightning_gap.monge.maps.residual import ResidualMLP
from lightning_gap.monge.maps.sphere import SphereMap
from lightning_gap.monge.objective import FittingLoss
from lightning_gap.monge.ot.costs import Cost, Euclidean, Geodesic, SqEuclidean
from lightning_gap.monge.ot.epsilon import Weighted
from lightning_gap.trainer.internals.of_lightning import trainer_if_any
from lightning_gap.trainer.strategy import data_parallel_size, from_rank_zero

if TYPE_CHECKING:
    from lightning_gap.monge.module import MongeMap

__all__ = [
    "GivenTerms", "Recipe", "cosine_over_run", "decide_weight", "default_map", "recipe_for", "say_choice",
    "say_if_gaussian",
    "take_recipe", "take_terms_of_checkpoint",
]  # fmt: skip

# From so many dimensions on a convex network costs more than it finds; and no plan tells what samples do not.
_MOST_DIMENSIONS = 128
_FEW = 1024  # samples of each side that tell the scale of costs
# Over the training samples, at most, before the default learning rate has decayed; but for the semi-dual, which knows
# few samples by heart, no fewer updates than samples, up to so many.
_PASSES, _UPDATES = 20, 500


class Recipe(NamedTuple):
    """How a map is trained by default."""

    fitting_loss: FittingLoss
    gap_weight: float
    lr: float
    decays: bool


class GivenTerms(NamedTuple):
    """Which terms of the training were given, and what was given that only some losses heed."""

    fitting_loss: bool
    gap_weight: bool
    optimizer: bool
    sinkhorn: bool
    reference: bool
    reweight: bool


def default_map(
    dim: int, cost: Cost, hidden: Sequence[int] | None, *, labels: int = 0, vectors: int | None = None
) -> nn.Module:
    """Return the network for samples of a dimension, a cost, and conditions that are labels or vectors of a length."""
    widths = (128, 128, 128) if hidden is None else check_widths(dim, hidden)
    if isinstance(cost, Geodesic):
        kinds = {"condition_dim": vectors} if vectors else {"num_conditions": labels or None}
        return SphereMap(dim, widths, start="plan", **kinds)
    beyond = "gaussian" if isinstance(cost, SqEuclidean) else "mean"
    start: Any = "plan" if dim <= _MOST_DIMENSIONS else beyond
    if vectors is not None:
        return ConditionalMap(dim, widths, condition_dim=vectors, start=start)
    if labels:
        return ConditionalMap(dim, widths, num_conditions=labels, start=start)
    if isinstance(cost, SqEuclidean) and start == "plan" and widths:
        return BrenierMap(dim, (64, 64, 64) if hidden is None else widths, start=start)
    return ResidualMLP(dim, widths, start=start)


def recipe_for(net: nn.Module | None, cost: Cost, given: GivenTerms, *, chosen: bool) -> Recipe:
    """Return the recipe for a network, which was ``chosen`` by this package or else given."""
    if isinstance(net, BrenierMap) and isinstance(cost, SqEuclidean):
        by_dual = not (given.sinkhorn or given.reweight)
        recipe = Recipe("semidual" if by_dual else "energy", 0.0, 1e-3, decays=True)
    elif chosen or getattr(net, "starts_at", None) == "plan":
        recipe = Recipe("energy", 0.1, 1e-3, decays=True)
    else:
        recipe = Recipe("sinkhorn", 1.0, 1e-3, decays=False)
    if given.sinkhorn:  # an argument that only this loss heeds
        recipe = recipe._replace(fitting_loss="sinkhorn")
    if given.reference:
        recipe = recipe._replace(gap_weight=max(recipe.gap_weight, 0.1))
    return recipe._replace(decays=recipe.decays and not given.optimizer)


def take_recipe(model: "MongeMap") -> None:
    """Give a model whose map has been chosen by its data the terms that were left open."""
    recipe = recipe_for(model.map, model.cost, model.given, chosen=True)
    if not model.given.fitting_loss:
        model.objective = replace(model.objective, fitting_loss=recipe.fitting_loss)
        model.hparams["fitting_loss"] = recipe.fitting_loss
    if not model.given.gap_weight:
        model.gap_weight = model.hparams["gap_weight"] = recipe.gap_weight
    if not model.given.optimizer:
        model.optimizer, model.decays = partial(Adam, lr=recipe.lr), recipe.decays
        model.hparams["optimizer"] = None if model.decays else describe(model.optimizer)


def take_terms_of_checkpoint(model: "MongeMap", found: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Take the map and the terms that were left open from a checkpoint: it was trained by the defaults of its time."""
    trainer = trainer_if_any(model)
    if trainer is not None and trainer.strategy.restore_checkpoint_after_setup:
        return  # the optimizer is made, and holds the weights
    described, mine = found.get("map"), described_map(model.map)
    before = {name for name in state if name.startswith("map.displacement.")}
    plain = described if isinstance(described, Mapping) else {}
    widths = None if model.hidden is None else (plain.get("init_args") or {}).get("hidden")
    of_others = widths is not None and list(widths) != list(model.hidden or ())  # which loading then refuses
    if model.map_is_chosen and (described or before) and described != mine and not of_others:
        if described is not None:
            net = build("map", described)
        elif isinstance(model.map, ResidualMLP) and model.map.starts_at == "identity":
            net = model.map
        else:  # older ones describe no map that was chosen by the dimension
            net = ResidualMLP(cast(int, getattr(model.map, "dim", found.get("dim"))), model.hidden or (128, 128, 128))
        if described is not None or set(net.state_dict()) == {n.removeprefix("map.") for n in before}:
            model.map = net.to(model.device)
            model.hparams["map"] = described_map(net)
    if trainer is None:
        return  # the arguments are those of the checkpoint
    loss, weight, optimizer = (found.get(name) for name in ("fitting_loss", "gap_weight", "optimizer"))
    if not model.given.fitting_loss and loss in ("sinkhorn", "energy", "semidual"):
        model.objective = replace(model.objective, fitting_loss=cast(FittingLoss, loss))
        model.hparams["fitting_loss"] = loss
    if not model.given.gap_weight and isinstance(weight, float | int):
        model.gap_weight = model.hparams["gap_weight"] = float(weight)
    if not model.given.optimizer and optimizer is not None:
        model.decays = False
        model.hparams["optimizer"] = describe(model.optimizer)


def cosine_over_run(model: "MongeMap", optimizer: Optimizer) -> LRScheduler | None:
    """Return a decay along a cosine over the run, or until there is no more to learn: some passes, or updates."""
    if not model.decays:
        return None
    total = float(model.trainer.estimated_stepping_batches)
    data = getattr(model.trainer, "datamodule", None)
    sizes, batch = getattr(data, "training_sizes", None), getattr(data, "batch_size", None)
    if sizes and batch and not getattr(data, "endless", False):
        update = batch * data_parallel_size(model.trainer) * model.trainer.accumulate_grad_batches
        most = math.ceil(_PASSES * max(sizes) / update)
        if model.objective.fitting_loss != "semidual":
            most = max(most, min(max(sizes), _UPDATES))
        if most < total:
            rank_zero_info(
                f"MongeMap: the default learning rate decays to 0 within {most} updates, and the run goes on: give "
                "optimizer= for a longer training"
            )
        total = min(total, most)
    if not math.isfinite(total) or total < 1:
        return None
    return LambdaLR(optimizer, partial(_cosine, total=total))


def _cosine(step: int, *, total: float) -> float:
    return (1 + math.cos(math.pi * min(1.0, step / total))) / 2


def decide_weight(model: "MongeMap", pairs: Sequence[tuple[Weighted, Weighted]]) -> None:
    """Make the default weight of the gap one of shares: of what is fitted, for each of what is paid.

    Units of the samples change a cost and the fitting loss by different powers, and the share by none.
    """
    recipe = recipe_for(model.map, model.cost, model.given, chosen=model.map_is_chosen)
    if model.given.gap_weight or not model.map_is_chosen or recipe.gap_weight == 0:
        return
    fitted = Euclidean() if model.objective.fitting_loss == "energy" else model.fitting_cost
    paid, unit = 0.0, 0.0
    for sides in pairs:
        x, y = (on_device(model, side.samples[:_FEW]) for side in sides)
        paid, unit = paid + model.cost.mean(x, y), unit + fitted.mean(x, y)
    known = paid > 0 and unit > 0 and math.isfinite(unit / paid)
    weight = float(f"{recipe.gap_weight * unit / paid:.4g}") if known else recipe.gap_weight
    model.gap_weight = model.hparams["gap_weight"] = from_rank_zero(model.trainer, weight)


def say_if_gaussian(model: "MongeMap") -> None:
    """Say where a map is the Gaussian map, and stays it."""
    share = getattr(model.map, "share", None)
    if isinstance(share, Tensor) and not bool(share):
        rank_zero_info(
            f"{type(model.map).__name__}: held-out samples do not tell a network from the Gaussian map, so the map is "
            "that one, and training leaves it as it is: give more samples, or map=ResidualMLP(dim, start='gaussian')"
        )


def say_choice(model: "MongeMap") -> None:
    """Say in a line what was chosen."""
    net = model.map
    start = getattr(net, "starts_at", None)
    loss = model.objective.fitting_loss
    rank_zero_info(
        f"MongeMap chose {type(net).__name__}" + (f"(start={start!r})" if start else "")
        + f" for the cost {model.cost} in {getattr(net, 'dim', '?')} dimensions, fitting_loss={loss!r}, "
        f"gap_weight={model.gap_weight}: give map=, fitting_loss=, gap_weight= for others"
    )  # fmt: skip
