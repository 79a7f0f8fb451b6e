"""How a training begins: the map starts from its samples, and the epsilons are decided by them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_gap.monge.border import as_network_takes
from lightning_gap.monge.epsilons import by_condition
from lightning_gap.monge.from_data import data_of
from lightning_gap.monge.ot.epsilon import Weighted
from lightning_gap.monge.samples.batches import UnpairedBatch
from lightning_gap.monge.schedules import counts
from lightning_gap.monge.signs import unused_conditions
from lightning_gap.monge.suitability import refuse_learned_cost
from lightning_gap.monge.training_loss import gathered
from lightning_gap.trainer.strategy import data_parallel_group, from_rank_zero

if TYPE_CHECKING:
    from lightning_gap.monge.module import MongeMap

__all__ = ["begin", "begin_with_batch"]

Pairs = Sequence[tuple[Weighted, Weighted]]


def begin(model: "MongeMap") -> bool:
    """Start the map and decide the epsilons, once, by all training samples; return whether the data tell them.

    Args:
        model: The map.
    """
    data = data_of(model)
    pairs = _training_pairs(data, decided=model.epsilons.complete)
    if pairs:
        _begin(model, pairs, data.training_samples, again=True)
    return bool(pairs)


def begin_with_batch(model: "MongeMap", b: UnpairedBatch) -> bool:
    """Do :func:`begin` with the first batch of all devices, so that all begin alike; return that it is done.

    Args:
        model: The map.
        b: This device's part of it.
    """
    group = data_parallel_group(model.trainer)
    source, target = gathered(b.source, group), gathered(b.target, group)
    weights = (gathered(w, group, -1) for w in (b.source_weights, b.target_weights))
    if b.condition is not None:
        model.remarks.say("conditions", lambda: unused_conditions(model.map))
    pairs = by_condition(*zip((source, target), weights, strict=True))
    _begin(model, pairs, lambda: (source, target), again=False)
    return True


@torch.no_grad()
def _begin(model: "MongeMap", pairs: Pairs, all_samples: Callable[[], tuple[Tensor, Tensor]], *, again: bool) -> None:
    def taken(x: Tensor) -> Tensor:
        return as_network_takes(model, x.to(model.device))

    for name, cost in (("cost", model.cost), ("fitting_cost", model.fitting_cost)):
        refuse_learned_cost(name, cost, taken(pairs[0][0].samples[:1]))
    if not model.epsilons.started:
        if callable(start := getattr(model.map, "start", None)):
            start(*(taken(part.flatten(0, -2)) for part in all_samples()))
        model.epsilons.start()
    kept = model.epsilons.decide(
        pairs, model.objective, gap_counts=counts(model.gap_weight), again=again, take=taken,
        agreed=partial(from_rank_zero, model.trainer),
    )  # fmt: skip
    if kept:
        rank_zero_warn(
            f"MongeMap goes on from an earlier fit on other samples, with its start and {', '.join(kept)}: "
            "make a new MongeMap for other samples, or give the epsilons"
        )


def _training_pairs(data: Any, *, decided: bool) -> list[tuple[Weighted, Weighted]]:
    """Return source and target of each condition; nothing where all is decided and they would have to be drawn."""
    if not hasattr(data, "training_samples") or (decided and getattr(data, "endless", False)):
        return []
    if hasattr(data, "training_pairs"):
        return [(Weighted(x.samples, x.weights), Weighted(y.samples, y.weights)) for x, y in data.training_pairs()]
    source, target = data.training_samples()
    return by_condition((source, None), (target, None))
