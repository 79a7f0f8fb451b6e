"""Joined running statistics, by ranks of which this process plays all."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_gap import precision
from lightning_gap.ghost import GhostBatchNorm1d, RunningStatisticsSync
from lightning_gap.ranks.group import RankGroup

KINDS = [(0.1, "sequential"), (None, "sequential"), (0.3, "per_step"), (1.0, "sequential")]


class Ranks(RankGroup):
    """What the other ranks have is given; this one is the first."""

    def __init__(self, others=()):
        self.group, self.size, self.others = None, 1 + len(others), others

    def gather(self, value):
        return torch.stack([value, *(other.to(value) for other in self.others)])


def layers(device="cpu"):
    return [
        GhostBatchNorm1d(3 + i, momentum=momentum, running_stats=stats, ghost_batch_size=4, device=device)
        for i, (momentum, stats) in enumerate(KINDS)
    ]


def read(layers):
    every = [buffer.double() for layer in layers for buffer in (layer.running_mean, layer.running_var)]
    return torch.cat(every), torch.stack([layer.num_batches_tracked for layer in layers])


def test_ranks_are_joined_as_one_that_sees_all_ghosts():
    torch.manual_seed(0)
    mine, theirs, one = layers(), layers(), layers()
    ranks = Ranks()
    sync = RunningStatisticsSync(mine, ranks, [0, 1])
    for step in range(3):
        sync.remember()
        for layer, other, whole in zip(mine, theirs, one, strict=True):
            batches = torch.randn(2, 4 * (step + 1), layer.num_features)
            layer(batches[0])
            other(batches[1])
            whole(batches.flatten(0, 1))
        (now, updates), (_, before) = read(theirs), (None, sync._updates_before)
        ranks.others = [torch.cat((now, (updates - before).double()))]
        sync.join()
        for layer, other, whole, (_, stats) in zip(mine, theirs, one, KINDS, strict=True):
            if stats == "sequential":
                for name, buffer in layer.named_buffers():
                    torch.testing.assert_close(buffer, getattr(whole, name))
            other.load_state_dict(copy.deepcopy(layer.state_dict()))
            whole.load_state_dict(copy.deepcopy(layer.state_dict()))


class Meta(TorchDispatchMode):
    """Sees to it that a device without double gets none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        assert all(t.dtype != torch.float64 for t in tree_leaves(result) if t.device.type == "meta"), func
        return result


@pytest.mark.parametrize("double", [True, False])
def test_no_number_is_read_from_the_device_nor_double_used_where_there_is_none(double, monkeypatch):
    if not double:
        monkeypatch.setattr(precision, "_WITHOUT_DOUBLE", {"meta"})
    on_device = layers("meta")
    size = sum(2 * layer.num_features for layer in on_device) + len(on_device)
    dtype = torch.float64 if double else torch.float32
    sync = RunningStatisticsSync(on_device, Ranks([torch.empty(size, dtype=dtype, device="meta")]), [0, 1])
    sync.remember()
    if double:
        sync.join()
    else:
        with Meta():
            sync.join()
    assert {buffer.device.type for layer in on_device for buffer in layer.buffers()} == {"meta"}
    constants = sync._known[1]
    sync.remember()
    sync.join()
    assert sync._known[1] is constants  # copied to the device once
    on_device[0].momentum = 0.5
    sync.remember()
    sync.join()
    assert sync._known[1] is not constants
