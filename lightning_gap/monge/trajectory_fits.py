"""Trajectories fitted to populations at several times, and checked at times that were left out."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import pairwise
from statistics import mean, stdev
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_gap.checks import check_integer
from lightning_gap.monge.fits import fitted
from lightning_gap.monge.module import MongeMap
from lightning_gap.monge.ot.energy import energy_distance
from lightning_gap.monge.ot.gaussian import gaussian_map
from lightning_gap.monge.ot.solve import optimal_transport
from lightning_gap.monge.samples.datamodule import SamplesDataModule
from lightning_gap.monge.trajectory import Trajectory, checked_times

__all__ = ["fit_trajectory", "held_out_times"]

_DRAWS = 5  # of samples that are compared


def fit_trajectory(
    populations: Any,
    times: Sequence[float],
    *,
    key: str | None = None,
    make_model: Callable[[], MongeMap] = MongeMap,
    make_trainer: Callable[[], Trainer] | None = None,
    max_steps: int = 1000,
    **data: Any,
) -> Trajectory:
    """Fit a map from each population to the next, and return their chain.

    It is a loop over :class:`SamplesDataModule`, :class:`MongeMap` and ``Trainer``; write your own for anything else,
    and give the maps to :class:`Trajectory`.

    Args:
        populations: Samples at each time: anything that :class:`SamplesDataModule` takes; or, with ``key``, one table
            of all, such as ``AnnData``.
        times: The times, in increasing order.
        key: Column that holds the time of each row, such as ``"day"``.
        make_model: Makes each map.
        make_trainer: Makes each trainer; by default one that writes and shows nothing.
        max_steps: Updates of each fit with that trainer.
        **data: Options of :class:`SamplesDataModule`, such as ``obsm="X_pca"``, ``conditions="cell_type"``,
            ``standardize=True`` or ``batch_size=256``. Nothing is held out unless ``val_fraction`` says so.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: Times do not increase or are not those of ``populations``, samples cannot be used, or
            ``components`` is given, which would differ from map to map.

    Example:
        >>> import torch
        >>> from lightning_gap.monge import ResidualMLP
        >>> _ = torch.manual_seed(0)
        >>> days = [torch.randn(300, 2) + day for day in range(3)]
        >>> trajectory = fit_trajectory(days, [0, 1, 2], max_steps=20, make_model=lambda: MongeMap(map=ResidualMLP(2)))
        >>> trajectory.at(days[0], [0.5, 1, 2]).shape
        torch.Size([3, 300, 2])
    """
    steps = _Steps(populations, times, key, make_model, make_trainer, max_steps, data)
    return Trajectory([steps.fit(k, k + 1) for k in range(len(steps.times) - 1)], steps.times)


def held_out_times(
    populations: Any,
    times: Sequence[float],
    *,
    key: str | None = None,
    make_model: Callable[[], MongeMap] = MongeMap,
    make_trainer: Callable[[], Trainer] | None = None,
    max_steps: int = 1000,
    most: int = 1000,
    **data: Any,
) -> list[dict[str, Any]]:
    r"""Leave out each time but the first and the last, and say how near interpolation comes to its population.

    A map is fitted from the population before to the one after, and its samples at the time between are compared with
    the population that was left out, in the map's coordinates: by the energy distance and by the exact Wasserstein-1
    distance of the Euclidean cost. All compare equal numbers of samples, in five draws of them, so that they compare
    with each other:

    =============== ==========================================================================
    ``candidate``   what is compared with the population
    =============== ==========================================================================
    ``"floor"``     other samples of itself: what a perfect interpolation scores
    ``"map"``       samples of the one before, moved by the map
    ``"linear"``    the same, moved by :func:`gaussian_map`
    ``"random"``    between random pairs of before and after, as Schiebinger et al. 2019 do
    ``"before"``    the population before: nothing happened yet
    ``"after"``     the population after: everything has happened
    =============== ==========================================================================

    A map that is not better than "linear" and "random" adds nothing to the averages that those already have.

    Args:
        populations: As in :func:`fit_trajectory`.
        times: As in :func:`fit_trajectory`, at least three.
        key: As in :func:`fit_trajectory`.
        make_model: As in :func:`fit_trajectory`.
        make_trainer: As in :func:`fit_trajectory`.
        max_steps: As in :func:`fit_trajectory`.
        most: Largest number of samples that are compared, whose exact transport takes some of its cube.
        **data: As in :func:`fit_trajectory`.

    Returns:
        A row for each time and candidate: ``time``, ``candidate``, ``samples``, the number of each set,
        ``energy_distance`` and ``wasserstein_1``, means over the draws, and ``energy_distance_std`` and
        ``wasserstein_1_std``, what one draw varies by; ``pandas.DataFrame(rows)`` is a table.

    Raises:
        TypeError: As in :func:`fit_trajectory`.
        ValueError: As in :func:`fit_trajectory`; or there are less than three times, or two samples at one of them.

    Example:
        >>> import torch
        >>> from lightning_gap.monge import ResidualMLP
        >>> _ = torch.manual_seed(0)
        >>> days = [torch.randn(200, 2) + 3 * day for day in range(3)]
        >>> rows = held_out_times(days, [0, 1, 2], max_steps=100, batch_size=100,
        ...                       make_model=lambda: MongeMap(map=ResidualMLP(2)))
        >>> error = {row["candidate"]: row["energy_distance"] for row in rows}
        >>> error["floor"] < error["map"] < error["before"]
        True
    """
    check_integer("most", most, 2)
    steps = _Steps(populations, times, key, make_model, make_trainer, max_steps, data)
    if len(steps.times) < 3:
        raise ValueError(f"times has {len(steps.times)} times: leaving one out needs one before and one after it")
    rows = []
    for before, k, after in zip(steps.times, steps.times[1:], steps.times[2:], strict=False):
        i = steps.times.index(k)
        rows += _held_out(steps, i, (k - before) / (after - before), most)
    return rows


class _Steps:
    """What each fit takes, checked before the first."""

    def __init__(
        self,
        populations: Any,
        times: Sequence[float],
        key: str | None,
        make_model: Callable[[], MongeMap],
        make_trainer: Callable[[], Trainer] | None,
        max_steps: int,
        data: dict[str, Any],
    ) -> None:
        self.labels = list(times)
        self.times = checked_times(self.labels, len(self.labels) if key is not None else len(populations))
        if len(self.times) < 2:
            raise ValueError(f"times has {len(self.times)} times: a map needs two populations")
        if data.get("components") is not None:
            raise ValueError(
                "components= would be other ones for each map, and each would lose what they do not span: give "
                "principal components of all populations together, as obsm='X_pca'"
            )
        self.populations, self.key = populations, key
        self.make_model, self.make_trainer = make_model, make_trainer
        self.max_steps = check_integer("max_steps", max_steps)
        self.options = {"val_fraction": 0.0, **data}
        for j, k in pairwise(range(len(self.times))):
            self.data(j, k)

    def data(self, j: int, k: int) -> SamplesDataModule:
        """Return the data of a map from one time to another."""
        if self.key is None:
            return SamplesDataModule(self.populations[j], self.populations[k], **self.options)
        rows: dict[str, Any] = {"source_rows": {self.key: self.labels[j]}, "target_rows": {self.key: self.labels[k]}}
        return SamplesDataModule(self.populations, self.populations, **rows, **self.options)

    def fit(self, j: int, k: int) -> MongeMap:
        """Return a map from one time to another."""
        return fitted(self.make_model, self.data(j, k), self.make_trainer, self.max_steps)


def _held_out(steps: _Steps, k: int, share: float, most: int) -> list[dict[str, Any]]:
    """Return the rows of one time that is left out."""
    data, left_out = steps.data(k - 1, k + 1), steps.data(k, k + 1)
    model = fitted(steps.make_model, data, steps.make_trainer, steps.max_steps)

    representation = deepcopy(model.representation).cpu() if model.representation is not None else None

    def coordinates(x: Tensor) -> Tensor:
        return (x.cpu() if representation is None else representation.encode(x.cpu())).double()

    moved = []
    for batch in data.predict_dataloader():
        x, condition = (batch, None) if isinstance(batch, Tensor) else batch
        moved.append(model.interpolate(x, share, condition if getattr(model.map, "conditional", False) else None))
    images, between = coordinates(torch.cat(moved)), coordinates(left_out.source)
    before, after = (coordinates(x) for x in (data.source, steps.data(k + 1, k).source))
    n = min(most, len(between) // 2, len(before), len(after), len(images))
    if n < 1:
        raise ValueError(f"the population at time {steps.times[k]:g} has {len(between)} samples: give it two at least")
    A, b = gaussian_map(before, after, shrinkage="auto")
    linear = torch.lerp(before, before @ A + b, share)
    generator = torch.Generator().manual_seed(0)

    def some(x: Tensor, size: int) -> Tensor:
        return x[torch.randperm(len(x), generator=generator)[:size]]

    scores: dict[str, list[tuple[float, float]]] = {}
    for _ in range(_DRAWS):
        reference, floor = some(between, 2 * n).split(n)
        candidates = {
            "floor": floor,
            "map": some(images, n),
            "linear": some(linear, n),
            "random": torch.lerp(some(before, n), some(after, n), share),
            "before": some(before, n),
            "after": some(after, n),
        }
        for name, x in candidates.items():
            exact = optimal_transport(x, reference, cost="euclidean", solver="exact").value
            scores.setdefault(name, []).append((float(energy_distance(x, reference)), float(exact)))
    rows = []
    for name, found in scores.items():
        row: dict[str, Any] = {"time": steps.times[k], "candidate": name, "samples": n}
        for score, values in zip(("energy_distance", "wasserstein_1"), zip(*found, strict=True), strict=True):
            row |= {score: mean(values), f"{score}_std": stdev(values)}
        rows.append(row)
    return rows
