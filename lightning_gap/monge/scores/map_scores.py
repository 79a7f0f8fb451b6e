"""All scores of a map on held-out samples, in one metric."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_gap.checks import check_integer, renamed
from lightning_gap.monge.ot.checks import check_epsilon, solver_precision
from lightning_gap.monge.ot.costs import Cost, CostLike, resolve
from lightning_gap.monge.ot.divergence import sinkhorn_divergence
from lightning_gap.monge.ot.energy import energy_distance
from lightning_gap.monge.ot.epsilon import FITTING_SHARE, GAP_SHARE
from lightning_gap.monge.ot.gap import Convention, check_convention, monge_gap
from lightning_gap.monge.ot.marginal import marginal_wasserstein
from lightning_gap.monge.ot.options import Solver, SolverOptions
from lightning_gap.monge.scores.certified import certified, too_few
from lightning_gap.monge.scores.pooling import DrawnMetric
from lightning_gap.monge.scores.pools import (
    Pool,
    by_condition,
    check_labels,
    labels_of,
    pools_of,
    rows_to_keep,
    typical_share,
)
from lightning_gap.monge.scores.truth import displacement_cosine, unexplained_variance

__all__ = ["MapScores"]

_ALWAYS = ("source", "mapped", "target", "source_weights", "target_weights", "source_condition", "target_condition")
_WITH_TRUTH = ("true_images",)
_WITH_FLOOR = ("target_again", "again_condition")


class MapScores(DrawnMetric):
    r"""Scores of a map :math:`T` from samples of :math:`\mu` to :math:`\nu`, over all samples that it was given.

    =========================== ====================================================================================
    ``sinkhorn_divergence``     :math:`S_\varepsilon(T\sharp\mu, \nu)` of the fitting cost (Feydy et al. 2019,
                                equation 3)
    ``energy_distance``         between :math:`T\sharp\mu` and :math:`\nu` (Székely and Rizzo 2013); no parameter
    ``wasserstein_1``           mean over the features of the Wasserstein-1 distance of their marginals
    ``monge_gap``               :math:`M^c_\varepsilon(T)` of ``cost`` (Uscidda and Cuturi 2023, equation 8)
    ``displacement``            :math:`E\, c(X, T(X))`
    ``unexplained_variance``    L2-UVP in percent, and
    ``displacement_cosine``     against the true map (Korotin et al. 2021, section 4); with ``true_images``
    ``..._floor``               of the first three, ``target_again`` in the place of the images: what a perfect map
                                scores on as many samples; with ``target_again``
    ``suboptimality``           what is paid in vain, in percent, and
    ``suboptimality_upper``     what that does not exceed at 95 %: :func:`suboptimality`; with ``certificates``
    ``l2_uvp_bound``            what L2-UVP does not exceed at 95 %: :func:`error_certificate`; with ``certificates``,
                                balanced transport, and a cost whose optimal maps are unique
    =========================== ====================================================================================

    All samples are kept, and gathered from all processes: scores of many samples are not means of those of their
    batches. Divergences, energy distances and gaps take at most ``max_samples`` of each set, chosen by a fixed
    permutation that leaves the global random numbers alone; the other scores take all.

    An epsilon that is not given is the fit's default share of a typical cost (the weighted mean, but for outliers) that
    no map changes, so that scores compare from epoch to epoch: 5 % of that within the target, and 1 % of that between
    source and target.

    With conditions, each score is that of one condition's samples, averaged over the conditions; epsilons are shared.

    Values carry no gradient.

    Args:
        cost: Ground cost of the gap and of the displacement: a name, an instance from :mod:`lightning_gap.costs`, or a
            function.
        fitting_cost: Ground cost of the divergence.
        fitting_epsilon: Regularization of the divergence, in units of its cost.
        gap_epsilon: Regularization of the gap, in units of ``cost``.
        convention: Of the gap: ``"shannon"`` (at least :math:`\varepsilon \log n`), ``"kl"``, or ``"debiased"``, 0 for
            the identity.
        rho: Strength of the divergence's soft marginals, in units of its cost; ``None`` for balanced transport.
        solver: Solver of divergence and gap, see :func:`optimal_transport`.
        max_samples: Most samples of each set, and condition, in divergences, energy distances and gaps.
        conditions: Names of the conditions in the order of their labels; :meth:`compute` then gives each one's scores
            too, as ``<score>/<name>``.
        certificates: Whether to compute the last three, for which exact plans take some seconds; at least 32 samples
            of each set and condition are needed.
        reach: Old name of ``rho``.
        **kwargs: Of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: An option is not known or out of range.

    Example:
        >>> import torch
        >>> x = torch.linspace(0, 1, 50)[:, None]
        >>> scores = MapScores(convention="debiased")
        >>> scores.update(x, x + 1, x + 1, true_images=x + 1, target_again=x + 1.01)
        >>> for name, value in scores.compute().items():
        ...     print(f"{name:26} {abs(float(value)):.3f}")
        sinkhorn_divergence        0.000
        energy_distance            0.000
        wasserstein_1              0.000
        monge_gap                  0.000
        displacement               1.000
        unexplained_variance       0.000
        displacement_cosine        1.000
        sinkhorn_divergence_floor  0.000
        energy_distance_floor      0.000
        wasserstein_1_floor        0.010
    """

    is_differentiable: bool = False
    source: list[Tensor]
    mapped: list[Tensor]
    target: list[Tensor]

    def __init__(
        self,
        cost: CostLike = "sqeuclidean",
        *,
        fitting_cost: CostLike = "sqeuclidean",
        fitting_epsilon: float | None = None,
        gap_epsilon: float | None = None,
        convention: Convention = "shannon",
        rho: float | None = None,
        solver: Solver = "auto",
        max_samples: int = 2048,
        conditions: Sequence[str] | None = None,
        certificates: bool = False,
        reach: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.cost: Cost = resolve(cost)
        self.fitting_cost: Cost = resolve(fitting_cost)
        self.fitting_epsilon = check_epsilon("fitting_epsilon", fitting_epsilon)
        self.gap_epsilon = check_epsilon("gap_epsilon", gap_epsilon)
        check_convention(convention, None)
        self.convention = convention
        self.rho = check_epsilon("rho", renamed("reach", "rho", reach, rho))
        self.solver = SolverOptions(solver).solver
        self.max_samples = check_integer("max_samples", max_samples)
        if isinstance(conditions, str) or (conditions is not None and len(set(conditions)) != len(conditions)):
            raise ValueError(f"conditions must be a sequence of names that differ, got {conditions!r}")
        self.conditions = None if conditions is None else tuple(str(name) for name in conditions)
        self.certificates = bool(certificates)
        self.said: set[str] = set()  # what is not said again; metrics after one another may share it
        for name in (*_ALWAYS, *_WITH_TRUTH, *_WITH_FLOOR):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    @property
    def reach(self) -> float | None:
        """Old name of ``rho``."""
        return self.rho

    def update(
        self,
        source: Tensor,
        mapped: Tensor,
        target: Tensor,
        *,
        source_weights: Tensor | None = None,
        target_weights: Tensor | None = None,
        parts_of: tuple[int, int] | None = None,
        condition: Tensor | None = None,
        true_images: Tensor | None = None,
        target_again: Tensor | None = None,
    ) -> None:
        """Add samples. Batches count by their numbers of samples.

        Args:
            source: ``(n, d)`` samples, or ``(K, n, d)`` for K conditions.
            mapped: Their images, of the same shape.
            target: ``(m, d)`` samples of the target, not paired with the others; or ``(K, m, d)``.
            source_weights: ``(n,)`` or ``(K, n)`` weights summing to 1 a condition; uniform by default. A sample of
                weight 0 is left out: give it to rows that only fill a batch up.
            target_weights: ``(m,)`` or ``(K, m)``, likewise.
            parts_of: Numbers of source and target samples of the batch of all processes, where this is one's part of
                it and weights sum to 1 over all of them.
            condition: ``(K,)`` labels of the conditions, or ``(K, p)`` vectors; by default they are 0 to K - 1.
            true_images: Images of ``source`` under the true map, where it is known.
            target_again: ``(k, d)`` or ``(K, k, d)`` further samples of the target, at best as many as of the source.

        Raises:
            TypeError: An argument is no floating-point tensor, or the dtypes differ.
            ValueError: Shapes or devices do not fit, values are not finite, a cost is not defined there, or optional
                arguments came with some batches only. Nothing has changed then.
        """
        given = {"source": source, "mapped": mapped, "target": target}
        given |= {n: x for n, x in (("true_images", true_images), ("target_again", target_again)) if x is not None}
        count = len(by_condition("source", source, source, None))
        sets = {name: by_condition(name, x, source, count) for name, x in given.items()}
        a = by_condition("source_weights", source_weights, source, count, weights=True)
        b = by_condition("target_weights", target_weights, source, count, weights=True)
        labels = labels_of(condition, source, count)
        if self.conditions is not None:
            check_labels(labels, self.conditions)
        rows: dict[str, list[Tensor]] = {}
        for k in range(count):
            where = "" if source.dim() == 2 else f"[{k}]"
            here = {name: x[k] for name, x in sets.items()}
            new = rows_to_keep(where, here, (a[k], b[k]), parts_of, labels[k : k + 1])
            self._check_domains(where, new)
            for name, x in new.items():
                rows.setdefault(name, []).append(x.detach())
        self._check_against_earlier(rows)
        for name, parts in rows.items():
            getattr(self, name).append(torch.cat(parts))

    def compute(self) -> dict[str, Tensor]:
        """Return the scores of all samples by name, each a scalar."""
        held = {name: getattr(self, name) for name in (*_ALWAYS, *_WITH_TRUTH, *_WITH_FLOOR)}
        kept = {name: dim_zero_cat(x) for name, x in held.items() if len(x)}
        pools = pools_of({name: x for name, x in kept.items() if name in _ALWAYS or x.numel()})
        self._say_what_is_left_out(pools)
        epsilons = self._epsilons(pools)
        each = [self._scores(pool, *epsilons) for pool in pools]
        if self.certificates and (few := too_few(pools)) is not None:
            self._say_once("certificates", rank_zero_info, few)
        elif self.certificates:
            for pool, one in zip(pools, each, strict=True):
                one |= certified(pool, self.cost, with_bound=self.rho is None)
        scores = {name: torch.stack([one[name] for one in each]).mean() for name in each[0]}
        if self.conditions is not None:
            for pool, one in zip(pools, each, strict=True):
                label = self.conditions[int(pool.label[0])]
                scores |= {f"{name}/{label}": value for name, value in one.items()}
        return scores

    def _check_domains(self, where: str, rows: Mapping[str, Tensor]) -> None:
        fitted = ("mapped", "target", "target_again")
        for cost, names in ((self.cost, ("source", "mapped")), (self.fitting_cost, fitted)):
            for name in names:
                if name in rows:
                    cost.check_domain(f"{name}{where}", rows[name])

    def _check_against_earlier(self, rows: Mapping[str, Sequence[Tensor]]) -> None:
        if not self.source:
            return
        for name in (*_WITH_TRUTH, "target_again"):
            if (name in rows) != bool(getattr(self, name)):
                now, before = ("this batch", "earlier ones") if name in rows else ("earlier batches", "this one")
                raise ValueError(f"{name} came with {now} and not with {before}: give it always, or never")
        for name in ("source", "source_condition"):
            new, old = rows[name][0], getattr(self, name)[0]
            if new.shape[1] != old.shape[1] or new.dtype != old.dtype:
                raise ValueError(
                    f"{name} is {new.dtype} of dimension {new.shape[1]}, but {old.dtype} of {old.shape[1]} in "
                    "earlier updates: use one metric for each space, or reset() between them"
                )

    def _say_what_is_left_out(self, pools: Sequence[Pool]) -> None:
        most = max(len(x) for pool in pools for x in pool.sets.values())
        if most > self.max_samples:
            self._say_once(
                "max_samples",
                rank_zero_info,
                f"MapScores takes {self.max_samples} of up to {most} samples of a set for divergences, energy "
                f"distances and gaps, and all for the other scores: raise max_samples for more",
            )
        if any(len(p.sets.get("target_again", p.sets["source"])) < len(p.sets["source"]) for p in pools):
            self._say_once(
                "target_again",
                rank_zero_info,
                "MapScores: target_again has fewer samples than the source, so the floors are those of that number, "
                "and somewhat high",
            )

    def _say_once(self, what: str, say: Callable[[str], Any], message: str) -> None:
        if what not in self.said:
            self.said.add(what)
            say(message)

    def _epsilons(self, pools: Sequence[Pool]) -> tuple[float | None, float | None]:
        """Return both epsilons; ``None`` where all costs are 0, and with them divergence or gap."""
        if self.solver == "exact":
            return None, None
        small = [pool.at_most(self.max_samples) for pool in pools]
        fitting, gap = self.fitting_epsilon, self.gap_epsilon
        if fitting is None:
            fitting = typical_share(FITTING_SHARE, self.fitting_cost, small, ("target", "target"), ("mapped", "target"))
        if gap is None:
            gap = typical_share(GAP_SHARE, self.cost, small, ("source", "target"), ("source", "mapped"))
        return fitting, gap

    def _scores(self, pool: Pool, fitting_epsilon: float | None, gap_epsilon: float | None) -> dict[str, Tensor]:
        # Of the floor's samples no more than there are images, in either.
        every, some = pool.at_most(sum(map(len, pool.sets.values()))), pool.at_most(self.max_samples)
        x, mapped, a = pool.sets["source"], pool.sets["mapped"], pool.source_weights
        scores = self._fit("mapped", every, some, fitting_epsilon)
        scores["monge_gap"] = torch.zeros_like(scores["energy_distance"])
        if gap_epsilon is not None or self.solver == "exact":
            scores["monge_gap"] = monge_gap(
                some.sets["source"], some.sets["mapped"], cost=self.cost, epsilon=gap_epsilon,
                convention=self.convention, weights=some.source_weights, solver=self.solver,
            )  # fmt: skip
        paid = solver_precision(self.cost.paired(x, mapped))
        scores["displacement"] = paid.mean() if a is None else a @ paid
        if "true_images" in pool.sets:
            scores |= self._against_truth(x, mapped, pool.sets["true_images"], a)
        if "target_again" in pool.sets:
            floors = self._fit("target_again", every, some, fitting_epsilon)
            scores |= {f"{name}_floor": value for name, value in floors.items()}
        return scores

    def _fit(self, images: str, every: Pool, some: Pool, epsilon: float | None) -> dict[str, Tensor]:
        """Return how far samples are from the target's: all of them, and some where it takes all pairs."""
        few, all_weights = (
            (pool.source_weights if images == "mapped" else None, pool.target_weights) for pool in (some, every)
        )
        x, y = some.sets[images], some.sets["target"]
        energy = solver_precision(energy_distance(x, y, weights=few))
        divergence = torch.zeros_like(energy)
        if epsilon is not None or self.solver == "exact":
            divergence = sinkhorn_divergence(
                x, y, cost=self.fitting_cost, epsilon=epsilon, weights=few, rho=self.rho, solver=self.solver
            )
        marginals = marginal_wasserstein(every.sets[images], every.sets["target"], weights=all_weights)
        return {"sinkhorn_divergence": divergence, "energy_distance": energy, "wasserstein_1": marginals.mean()}

    def _against_truth(self, x: Tensor, mapped: Tensor, true: Tensor, weights: Tensor | None) -> dict[str, Tensor]:
        cosine = displacement_cosine(x, mapped, true, weights=weights)
        try:
            share = unexplained_variance(mapped, true, weights=weights)
        except ValueError as error:
            self._say_once("variance", rank_zero_warn, f"unexplained_variance is NaN: {error}")
            share = torch.full_like(cosine, torch.nan)
        return {"unexplained_variance": share, "displacement_cosine": cosine}
