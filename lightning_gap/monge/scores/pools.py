"""The samples that scores are of: checked, kept, and one pool a condition."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gap.monge.ot.checks import check_pair, solver_precision
from lightning_gap.monge.ot.costs import Cost
from lightning_gap.monge.ot.epsilon import Weighted, mean_scale
from lightning_gap.monge.ot.priority_sampling import few_of
from lightning_gap.monge.ot.subsets import fixed_rows
from lightning_gap.monge.scores.pooling import pooled, pooling_weights

__all__ = ["Pool", "by_condition", "check_labels", "labels_of", "pools_of", "rows_to_keep", "typical_share"]

# Whose conditions the samples of a set have.
_CONDITION_OF = {
    "source": "source",
    "mapped": "source",
    "true_images": "source",
    "target": "target",
    "target_again": "again",
}


@dataclass(frozen=True)
class Pool:
    """All samples of one condition."""

    label: Tensor
    sets: dict[str, Tensor]
    source_weights: Tensor | None
    target_weights: Tensor | None

    def at_most(self, most: int) -> "Pool":
        """Return a fixed choice of samples of each set, the floor's no more than the source's."""
        sizes = {name: len(x) for name, x in self.sets.items()}
        most_of = {name: min(most, sizes["source"]) if name == "target_again" else most for name in sizes}
        rows = {name: fixed_rows(size, most_of[name]) for name, size in sizes.items()}
        sets = {name: x if rows[name] is None else x[rows[name]] for name, x in self.sets.items()}
        weights = (_of(self.source_weights, rows["source"]), _of(self.target_weights, rows["target"]))
        return Pool(self.label, sets, *weights)


def _of(weights: Tensor | None, rows: Tensor | None) -> Tensor | None:
    if weights is None or rows is None:
        return weights
    weights = weights[rows]
    return weights / weights.sum()


def pools_of(kept: Mapping[str, Tensor]) -> list[Pool]:
    """Return the samples of each condition, by label; one pool where there are none."""
    labels = torch.unique(kept["source_condition"], dim=0)
    pools = []
    for label in labels:
        here = {
            name: (kept[f"{name}_condition"] == label).all(1)
            for name in ("source", "target", "again")
            if f"{name}_condition" in kept
        }
        if not bool(here["target"].any()):
            raise ValueError(f"condition {label.tolist()} has source samples and no target samples")
        sets = {n: kept[n][here[of]] for n, of in _CONDITION_OF.items() if n in kept}
        weights = (kept[f"{n}_weights"][here[n]] for n in ("source", "target"))
        a, b = (pooled(w, sets["source"]) for w in weights)
        pools.append(Pool(label, sets, a, b))
    return pools


def rows_to_keep(
    where: str,
    given: Mapping[str, Tensor],
    weights: tuple[Tensor | None, Tensor | None],
    parts_of: tuple[int, int] | None,
    label: Tensor,
) -> dict[str, Tensor]:
    """Return what one condition's samples add to each state, once they have been checked."""
    source, target = given["source"], given["target"]
    for name, x in given.items():
        paired = name in ("mapped", "true_images")
        check_pair(f"source{where}", source, f"{name}{where}", x, same_length=paired)
    n, m = parts_of or (None, None)
    a = pooling_weights(f"source_weights{where}", weights[0], source, n)
    b = pooling_weights(f"target_weights{where}", weights[1], target, m)
    rows = {name: given[name][a > 0] for name in ("source", "mapped", "true_images") if name in given}
    rows |= {"target": target[b > 0], "source_weights": a[a > 0], "target_weights": b[b > 0]}
    if "target_again" in given:
        rows["target_again"] = given["target_again"]
    labels = {"source_condition": "source", "target_condition": "target", "again_condition": "target_again"}
    return rows | {name: label.expand(len(rows[of]), -1) for name, of in labels.items() if of in rows}


def by_condition(
    name: str, x: Tensor | None, source: Tensor, conditions: int | None, *, weights: bool = False
) -> Sequence[Any]:
    """Return the part of each condition; ``None`` for each where there is nothing."""
    if x is None:
        return [None] * (conditions or 1)
    for tensor_name, tensor in (("source", source), (name, x)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{tensor_name} must be a tensor, got {type(tensor).__name__}: use torch.as_tensor")
    if source.dim() not in (2, 3):
        raise ValueError(f"source must have shape (n, d), or (K, n, d) for conditions, got {tuple(source.shape)}")
    if x.dim() != source.dim() - weights:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} beside source {tuple(source.shape)}: give both by condition"
        )
    parts = [x] if source.dim() == 2 else list(x)
    if conditions is not None and len(parts) != conditions:
        raise ValueError(f"{name} has {len(parts)} conditions, but source has {conditions}")
    if not parts:
        raise ValueError(f"{name} is empty, with shape {tuple(x.shape)}: it needs at least one condition")
    return parts


def labels_of(condition: Tensor | None, source: Tensor, conditions: int) -> Tensor:
    """Return ``(K, 1)`` labels or ``(K, p)`` vectors."""
    if condition is None:
        return torch.arange(conditions, device=source.device)[:, None]
    if not isinstance(condition, Tensor) or condition.dim() not in (1, 2) or len(condition) != conditions:
        got = tuple(condition.shape) if isinstance(condition, Tensor) else type(condition).__name__
        raise ValueError(f"condition must be ({conditions},) labels or ({conditions}, p) vectors, got {got}")
    labels = condition.detach().to(source.device)
    return labels[:, None] if labels.dim() == 1 else labels


def check_labels(labels: Tensor, names: Sequence[str]) -> None:
    """Raise ``ValueError`` unless each condition is a label that has a name."""
    if labels.shape[1] != 1 or labels.is_floating_point():
        raise ValueError("conditions names labels, but condition holds vectors: leave conditions out")
    bad = (labels < 0) | (labels >= len(names))
    if bool(bad.any()):
        raise ValueError(
            f"condition holds the label {int(labels[bad][0])}, but there are {len(names)} names in "
            "conditions: name them all"
        )


def typical_share(share: float, cost: Cost, pools: Sequence[Pool], *pairs: tuple[str, str]) -> float | None:
    """Return a share of the first pair's typical cost that is not 0, averaged over the conditions."""
    for names in pairs:
        sides = [
            [Weighted(p.sets[n], p.target_weights if n == "target" else p.source_weights) for n in names] for p in pools
        ]
        if (typical := mean_scale(cost, few_of([(x, y) for x, y in sides], solver_precision), "typical")) > 0:
            return share * typical
    return None
