"""Running statistics of several ranks that train one model, joined as if one process had seen every ghost."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gap.ghost.layers import GhostNorm, statistics_of
from lightning_gap.precision import widest
from lightning_gap.ranks.group import RankGroup

__all__ = ["RunningStatisticsSync"]


class _Layout(NamedTuple):
    """What is known of the layers beside their statistics, on their device."""

    layer_of: Tensor  # of each statistic, the number of its layer
    momenta: Tensor  # of each layer, 1 - η, and 1 where there is none
    cumulative: Tensor  # of each layer, whether it has no momentum
    per_step: Tensor  # of each layer, whether a batch is one update
    representatives: Tensor  # the ranks whose ghosts count


class RunningStatisticsSync:
    r"""Joins what the ranks' running statistics have become since they were equal.

    With sequential statistics the result is that of one process that sees the ghosts of rank 0, then those of rank 1,
    and so on. A rank's step is :math:`R \mapsto d_r R + c_r` with :math:`d_r = (1-\eta)^{G_r}`, so from :math:`R_r`,
    where rank r went from the common R, follows :math:`c_r = R_r - d_r R`, and the steps are applied one after another.
    Per-step statistics become the mean over ranks, which weighs a step with η in all. Cumulative averages
    (``momentum=None``) become the average over all ranks' updates.

    Call :meth:`remember` where the statistics of all ranks are equal, and :meth:`join` on all ranks after at most one
    training step of each. A join is one collective.

    Args:
        layers: The ghost layers; those without running statistics are left out.
        ranks: The ranks.
        representatives: The ranks, by their place in ``ranks``, whose ghosts count: one of those that share a ghost.

    Example:
        >>> import torch.distributed as dist
        >>> from lightning_gap.ghost import GhostBatchNorm1d
        >>> store = dist.HashStore()
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> layer = GhostBatchNorm1d(3, ghost_batch_size=4)
        >>> sync = RunningStatisticsSync([layer], RankGroup(), representatives=range(1))
        >>> sync.remember()
        >>> _ = layer(torch.randn(8, 3))
        >>> sync.join()  # of one rank: nothing changes
        >>> int(layer.num_batches_tracked)
        2
        >>> dist.destroy_process_group()
    """

    def __init__(self, layers: Iterable[GhostNorm], ranks: RankGroup, representatives: Iterable[int]) -> None:
        self.layers = [layer for layer in layers if layer.num_batches_tracked is not None]
        self.ranks, self.representatives = ranks, list(representatives)
        self._before: Tensor | None = None
        self._updates_before: Tensor | None = None
        self._known: tuple[tuple[torch.device, list[float | None]], _Layout] | None = None

    def remember(self) -> None:
        """Keep the statistics as they are now."""
        if self.layers:
            self._before, self._updates_before = self._read()

    def join(self) -> None:
        """Give all ranks the statistics of all; without :meth:`remember` before, do nothing."""
        if self._before is None or self._updates_before is None:
            return
        old, counted = self._before, self._updates_before
        self._before = self._updates_before = None
        now, updates = self._read()
        layout = self._layout(now)
        every = self.ranks.gather(torch.cat((now, (updates - counted).to(now.dtype))))
        every = every.index_select(0, layout.representatives)
        stats, steps = every[:, : len(now)], every[:, len(now) :]

        def spread(per_layer: Tensor) -> Tensor:
            return per_layer.index_select(0, layout.layer_of)

        joined, start = old, counted.to(now.dtype)
        total = start
        for new, step in zip(stats, steps, strict=True):
            keep, keep_total = _keep(layout, start, step), _keep(layout, total, step)
            # c in units of one update, for cumulative averages weigh it by their length
            share = torch.where(keep < 1, (1 - keep_total) / (1 - keep).clamp(min=1e-30), torch.zeros_like(keep))
            change = new - spread(keep) * old
            joined = spread(keep_total) * joined + spread(share) * change
            total = total + step
        joined = torch.where(spread(layout.per_step), stats.mean(0), joined)
        made = torch.where(layout.per_step, steps.amax(0), steps.sum(0))
        self._write(joined, counted + made.to(counted.dtype))

    def _layout(self, statistics: Tensor) -> _Layout:
        """Return the layers' layout; copied to their device once, until a momentum is changed."""
        momenta = [layer.momentum for layer in self.layers]
        key = statistics.device, momenta
        if self._known is None or self._known[0] != key:
            sizes = [2 * layer.num_features for layer in self.layers]
            layout = (
                torch.arange(len(sizes), device="cpu").repeat_interleave(torch.tensor(sizes, device="cpu")),
                torch.tensor([1.0 if m is None else 1 - m for m in momenta], dtype=statistics.dtype, device="cpu"),
                torch.tensor([momentum is None for momentum in momenta], device="cpu"),
                torch.tensor([layer.running_stats == "per_step" for layer in self.layers], device="cpu"),
                torch.tensor(self.representatives, device="cpu"),
            )
            self._known = key, _Layout(*(t.to(statistics.device) for t in layout))
        return self._known[1]

    def _read(self) -> tuple[Tensor, Tensor]:
        """Return the statistics of all layers in one row, and the numbers of their updates."""
        buffers = [statistics_of(layer) for layer in self.layers]
        wide = widest(buffers[0][0].device)
        running = [each.to(wide) for mean, var, _ in buffers for each in (mean, var)]
        return torch.cat(running), torch.stack([updates for _, _, updates in buffers])

    def _write(self, statistics: Tensor, updates: Tensor) -> None:
        parts = iter(statistics.split([layer.num_features for layer in self.layers for _ in range(2)]))
        with torch.no_grad():
            for layer, count in zip(self.layers, updates, strict=True):
                mean, var, counted = statistics_of(layer)
                mean.copy_(next(parts))
                var.copy_(next(parts))
                counted.copy_(count)


def _keep(layout: _Layout, counted: Tensor, steps: Tensor) -> Tensor:
    """Return the weight that each layer's old statistics keep through so many updates."""
    return torch.where(layout.cumulative, counted / (counted + steps).clamp(min=1), layout.momenta**steps)
