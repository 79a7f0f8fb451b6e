"""Maps between populations at several times, chained."""

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_gap.checks import check_number
from lightning_gap.monge.border import read_samples
from lightning_gap.monge.dynamics import inverse, is_one, times_of
from lightning_gap.monge.map_files import read_maps, write_maps
from lightning_gap.monge.module import MongeMap

__all__ = ["Trajectory", "check_spaces", "checked_times"]


class Trajectory:
    r"""The way of samples through populations at several times, each mapped to the next.

    .. math::
        x(t) = (1 - s)\, x_k + s\, T_k(x_k), \qquad s = \frac{t - t_k}{t_{k+1} - t_k}, \qquad x_{k+1} = T_k(x_k)

    for :math:`t_k \le t \le t_{k+1}`: displacement interpolation between neighbours (Schiebinger et al. 2019,
    "Optimal-Transport Analysis of Single-Cell Gene Expression Identifies Developmental Trajectories", interpolate so by
    plans; maps also take cells that were not in the fit). Samples go forwards through the maps and backwards through
    their inverses, from any time.

    :func:`fit_trajectory` fits the maps; :func:`held_out_times` tells what such an interpolation is worth on your data.
    Between two populations samples move on straight lines at constant speed (great circles on the sphere), whatever
    happened there: the ways bend at the times alone.

    Args:
        maps: Fitted maps, each from the population at one time to that at the next.
        times: The times, one more, in increasing order.

    Raises:
        TypeError: A map is no :class:`MongeMap`.
        ValueError: Numbers do not fit, times do not increase, or the maps' spaces differ.

    Example:
        >>> import torch
        >>> from lightning_gap import MongeMap
        >>> from lightning_gap.monge import ResidualMLP
        >>> x, maps = torch.randn(500, 2), []
        >>> for shift in (2.0, -6.0):
        ...     net = ResidualMLP(2, start="mean")
        ...     net.start(x, x + shift)
        ...     maps.append(MongeMap(map=net))
        >>> trajectory = Trajectory(maps, times=[0, 1, 3])
        >>> [round(float((moved - x).mean()), 2) for moved in trajectory.at(x, [0, 0.5, 1, 2, 3])]
        [0.0, 1.0, 2.0, -1.0, -4.0]
        >>> torch.allclose(trajectory.at(trajectory.at(x, 2.5), 0.5, since=2.5), x + 1, atol=1e-4)
        True
    """

    def __init__(self, maps: Sequence[MongeMap], times: Sequence[float]) -> None:
        maps = list(maps)
        for k, model in enumerate(maps):
            if not isinstance(model, MongeMap):
                raise TypeError(f"maps[{k}] must be a MongeMap, got {type(model).__name__}")
            if model.map is None:
                raise ValueError(f"maps[{k}] has no network yet: fit it first")
        self.maps = maps
        self.times = checked_times(times, len(maps) + 1)
        if not maps:
            raise ValueError("maps is empty: give a map between each two times")
        check_spaces(maps)

    def __repr__(self) -> str:
        return f"Trajectory({len(self.maps)} maps, times={self.times})"

    def to(self, device: str | torch.device) -> "Trajectory":
        """Move the maps to a device, and return the trajectory."""
        for model in self.maps:
            model.to(device)
        return self

    def at(
        self,
        x: Any,
        t: Any,
        *,
        since: float | None = None,
        condition: Any = None,
        batch_size: int = 65_536,
        layer: str | None = None,
        obsm: str | None = None,
    ) -> Tensor:
        """Return where raw samples are, or were, at one time or several.

        Args:
            x: ``(n, d)`` samples, as in :meth:`MongeMap.transport`.
            t: A time within those of the trajectory, or several, in any order.
            since: Time of the samples; the first by default. It may lie between two populations.
            condition: Conditions, as in :meth:`MongeMap.transport`, by name where the maps know different ones.
            batch_size: Rows that go through a network at once.
            layer: Layer of ``AnnData``, as in :meth:`MongeMap.transport`.
            obsm: Embedding of ``AnnData`` in place of a layer.

        Returns:
            ``(n, d)`` tensor, or ``(len(t), n, d)`` for several times, as of :meth:`MongeMap.transport`. Samples that
            the way back does not reach are warned of as by :meth:`MongeMap.inverse`.

        Raises:
            TypeError: ``x`` is a path, or holds no real numbers.
            ValueError: A time is outside those of the trajectory, or ``x`` or ``condition`` cannot be used.
        """
        wanted = times_of("t", t, self.times[0], self.times[-1])
        start = self.times[0] if since is None else times_of("since", since, self.times[0], self.times[-1])[0]
        samples = read_samples(self.maps[0], "x", x, layer, obsm)
        way = _Way(self, samples, start, condition, batch_size)
        points = [way.at(time) for time in wanted]
        return points[0] if is_one(t) else torch.stack(points)

    def save(self, path: str | Path) -> None:
        """Write maps and times into one file, of tensors and plain Python alone.

        Args:
            path: The file.

        Raises:
            MisconfigurationException: A network is one of your own, which the file would not hold.
        """
        write_maps(path, "trajectory", self.maps, times=self.times)

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "cpu", **given: Any) -> "Trajectory":
        """Return the trajectory of a file. Nothing that it names is run but this package's maps.

        Args:
            path: A file that :meth:`save` wrote.
            device: Where to put the maps.
            **given: Arguments of every map that the file holds the name of only, such as a cost of your own.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, or holds anything else.
        """
        maps, about = read_maps(path, "trajectory", device, given)
        return cls(maps, about["times"])


class _Way:
    """The way of some samples: where they are at the populations' times, found when it is asked for."""

    def __init__(self, trajectory: Trajectory, x: Tensor, since: float, condition: Any, batch_size: int) -> None:
        self.maps, self.times = trajectory.maps, trajectory.times
        self.condition, self.batch_size = condition, batch_size
        k, share = self._segment(since)
        if share in (0, 1):
            k = k + int(share)
        else:
            x = inverse(self.maps[k], x, condition, t=share, argument="x")
        self.anchors = {k: x}

    def at(self, t: float) -> Tensor:
        """Return the samples at a time."""
        k, share = self._segment(t)
        return self.maps[k].interpolate(self._anchor(k), share, self.condition, batch_size=self.batch_size)

    def _segment(self, t: float) -> tuple[int, float]:
        """Return between which populations a time is, and at what share of the way."""
        k = min(bisect_right(self.times, t), len(self.maps)) - 1
        return k, (t - self.times[k]) / (self.times[k + 1] - self.times[k])

    def _anchor(self, k: int) -> Tensor:
        for j in range(max(self.anchors), k):
            self.anchors[j + 1] = self.maps[j].transport(self.anchors[j], self.condition, batch_size=self.batch_size)
        for j in range(min(self.anchors), k, -1):
            self.anchors[j - 1] = inverse(self.maps[j - 1], self.anchors[j], self.condition, argument="x")
        return self.anchors[k]


def checked_times(times: Sequence[float], count: int) -> list[float]:
    """Return increasing times as numbers, or say what is wrong with them."""
    found = [check_number(f"times[{k}]", time) for k, time in enumerate(times)]
    if len(found) != count:
        raise ValueError(f"times has {len(found)} times for {count} populations: give one for each")
    for k in range(1, len(found)):
        if found[k] <= found[k - 1]:
            raise ValueError(
                f"times must increase, got {found[k - 1]:g} before {found[k]:g}: sort them with their maps"
            )
    return found


def check_spaces(maps: Sequence[MongeMap]) -> None:
    """Refuse maps whose raw samples are not of one space."""

    def space(model: MongeMap) -> tuple[int | None, list[str] | None]:
        dim = getattr(model.map, "dim", None) if model.representation is None else len(model.representation.mean)
        return dim if isinstance(dim, int) else None, model.feature_names

    first_dim, first_names = space(maps[0])
    for k, model in enumerate(maps):
        dim, names = space(model)
        if None not in (dim, first_dim) and dim != first_dim:
            raise ValueError(f"maps[{k}] takes {dim} features and maps[0] {first_dim}: all must be of one space")
        if None not in (names, first_names) and names != first_names:
            raise ValueError(
                f"maps[{k}] has other features than maps[0], or another order: fit all on the same columns"
            )
