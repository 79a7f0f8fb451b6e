"""Running statistics of several ranks that train one model, joined as if one process had seen every ghost."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_gap.ghost.layers import GhostNorm
from lightning_gap.parallel import RankGroup

__all__ = ["RunningStatisticsSync"]


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
        every = self.ranks.gather(torch.cat((now, updates - counted)))[self.representatives]
        stats, steps = every[:, : len(now)], every[:, len(now) :]
        sizes = torch.tensor([2 * layer.num_features for layer in self.layers], device=now.device)

        def spread(per_layer: Tensor) -> Tensor:
            return per_layer.repeat_interleave(sizes)

        joined, total = old, counted
        for new, step in zip(stats, steps, strict=True):
            keep, keep_total = self._keep(counted, step), self._keep(total, step)
            # c in units of one update, for cumulative averages weigh it by their length
            share = torch.where(keep < 1, (1 - keep_total) / (1 - keep).clamp(min=1e-30), torch.zeros_like(keep))
            change = new - spread(keep) * old
            joined = spread(keep_total) * joined + spread(share) * change
            total = total + step
        per_step = torch.tensor([layer.running_stats == "per_step" for layer in self.layers], device=now.device)
        joined = torch.where(spread(per_step), stats.mean(0), joined)
        total = torch.where(per_step, counted + steps.amax(0), total)
        self._write(joined, total)

    def _keep(self, counted: Tensor, steps: Tensor) -> Tensor:
        """Return the weight that each layer's old statistics keep through so many updates."""
        momenta = [layer.momentum for layer in self.layers]
        fixed = steps.new_tensor([1.0 if momentum is None else 1 - momentum for momentum in momenta])
        cumulative = torch.tensor([momentum is None for momentum in momenta], device=steps.device)
        return torch.where(cumulative, counted / (counted + steps).clamp(min=1), fixed**steps)

    def _read(self) -> tuple[Tensor, Tensor]:
        buffers = [buffer.double() for layer in self.layers for buffer in _running(layer)]
        updates = [_updates(layer).double() for layer in self.layers]
        return torch.cat(buffers), torch.stack(updates)

    def _write(self, statistics: Tensor, updates: Tensor) -> None:
        sizes = [len(buffer) for layer in self.layers for buffer in _running(layer)]
        parts = iter(statistics.split(sizes))
        with torch.no_grad():
            for layer, count in zip(self.layers, updates, strict=True):
                for buffer in _running(layer):
                    buffer.copy_(next(parts))
                _updates(layer).copy_(count)


def _running(layer: GhostNorm) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


def _updates(layer: GhostNorm) -> Tensor:
    assert layer.num_batches_tracked is not None
    return layer.num_batches_tracked
