"""Four gloo processes, started once: every check compares with one process that sees the samples of all."""

import copy
import pickle
import warnings
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from gloo import enter_world, free_port, leave_world, start_processes
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from lightning_gap import GhostBatchNorm, convert_ghost_batchnorm, recalibrate_batchnorm, revert_ghost_batchnorm
from lightning_gap.ghost import GhostBatchNorm1d, GhostNorm, RunningStatisticsSync, ghost_batch_norm
from lightning_gap.ranks.group import RankGroup

RANKS = 4
SPATIAL = {2: (), 3: (5,), 4: (3, 4), 5: (2, 3, 2)}
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def near(mine, expected):
    torch.testing.assert_close(mine, expected, **TIGHT)


def in_format(x, channels_last):
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


def check_one_ghost(rank, sizes, group, members, dim, channels_last, dtype=torch.float64):
    """Outputs, gradients and statistics of ``members``' samples as one ghost."""
    generator = torch.Generator().manual_seed(dim)
    x, upstream = torch.randn(2, sum(sizes), 3, *SPATIAL[dim], generator=generator, dtype=torch.float64).unbind(0)
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    mine, own = slice(bounds[rank], bounds[rank + 1]), slice(bounds[members[0]], bounds[members[-1] + 1])
    weight, bias = torch.randn(2, 3, generator=generator, dtype=torch.float64).unbind(0)

    def run(x, upstream, **options):
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        mean, var = torch.zeros(3, dtype=wide), torch.ones(3, dtype=wide)
        updates = torch.tensor(3)
        leaves = [
            t.clone().requires_grad_() for t in (in_format(x, channels_last).to(dtype), weight.to(wide), bias.to(wide))
        ]
        y = ghost_batch_norm(leaves[0], mean, var, *leaves[1:], momentum=None, num_batches_tracked=updates, **options)
        y.backward(upstream.to(dtype))
        return y.detach(), *(t.grad for t in leaves), mean, var, updates

    y, grad_x, grad_w, grad_b, *statistics = run(x[mine], upstream[mine], ghost_batch_size=99, process_group=group)
    whole = run(x[own], upstream[own], ghost_batch_size=99)
    place = slice(mine.start - own.start, mine.stop - own.start)
    tight = TIGHT if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(y, whole[0][place], **tight)
    torch.testing.assert_close(grad_x, whole[1][place], **tight)
    for gradient, expected in zip((grad_w, grad_b), whole[2:4], strict=True):
        dist.all_reduce(gradient, group=group)
        torch.testing.assert_close(gradient, expected, **(tight | {"atol": 20 * tight["atol"]}))
    for mine_, expected in zip(statistics, whole[4:], strict=True):
        torch.testing.assert_close(mine_, expected, **tight)


def spanning_ghosts(rank):
    for sizes in ([4, 4, 4, 4], [5, 7, 4, 8], [6, 0, 3, 1]):
        for dim in SPATIAL:
            for channels_last in (False, True):
                check_one_ghost(rank, sizes, dist.group.WORLD, range(RANKS), dim, channels_last)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for sizes in ([3, 3, 5, 5], [1, 4, 2, 3]):
        check_one_ghost(rank, sizes, pairs[rank // 2], range(2 * (rank // 2), 2 * (rank // 2) + 2), 4, False)
    check_one_ghost(rank, [8, 8, 5, 8], dist.group.WORLD, range(RANKS), 4, False, torch.bfloat16)

    layer = convert_ghost_batchnorm(nn.BatchNorm1d(3), 16, process_group=dist.group.WORLD)
    assert "over 4 ranks" in repr(layer)
    assert copy.deepcopy(layer).process_group is layer.process_group
    assert pickle.loads(pickle.dumps(layer)).process_group is None
    assert type(revert_ghost_batchnorm(layer)) is nn.BatchNorm1d
    with pytest.raises(AttributeError):
        _ = layer.process_group


def second_derivatives(rank):
    generator = torch.Generator().manual_seed(5)
    for dim in SPATIAL:
        x = torch.randn(16, 3, *SPATIAL[dim], generator=generator, dtype=torch.float64)
        found = []
        for part, group in ((x, None), (x[4 * rank : 4 * rank + 4], dist.group.WORLD)):
            leaf = part.clone().requires_grad_()
            y = ghost_batch_norm(leaf, None, None, ghost_batch_size=16, process_group=group)
            (gradient,) = torch.autograd.grad(y.pow(3).sum(), leaf, create_graph=True)
            found.append(torch.autograd.grad(gradient.pow(2).sum(), leaf)[0])
        near(found[1], found[0][4 * rank : 4 * rank + 4])


class Fused(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x).relu()


def own_forward_spans(rank):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(RANKS, 4, 3, generator=generator, dtype=torch.float64)
    layer = convert_ghost_batchnorm(Fused(3, dtype=torch.float64), 16, process_group=dist.group.WORLD)
    near(layer(x[rank]), Fused(3, dtype=torch.float64)(x.flatten(0, 1)).unflatten(0, (RANKS, 4))[rank])


def joined_statistics(rank):
    generator = torch.Generator().manual_seed(2)
    ghosts_of = [1, 3, 0, 2]  # of rank r in each step
    for momentum in (0.1, 1.0, None):
        one = GhostBatchNorm1d(3, momentum=momentum, ghost_batch_size=4, dtype=torch.float64)
        mine = copy.deepcopy(one)
        sync = RunningStatisticsSync([mine], RankGroup(), range(RANKS))
        for _ in range(3):
            batches = [torch.randn(4 * n, 3, generator=generator, dtype=torch.float64) + n for n in ghosts_of]
            one(torch.cat(batches))
            sync.remember()
            if len(batches[rank]):
                mine(batches[rank])
            sync.join()
        for name, buffer in mine.named_buffers():
            near(buffer, getattr(one, name))
    mine = GhostBatchNorm1d(3, ghost_batch_size=4, running_stats="per_step", dtype=torch.float64)
    sync = RunningStatisticsSync([mine], RankGroup(), range(RANKS))
    sync.remember()
    mine(torch.full((8, 3), float(rank), dtype=torch.float64))
    sync.join()
    near(mine.running_mean, torch.full((3,), 0.1 * 1.5, dtype=torch.float64))  # one update of weight η, by the mean
    assert int(mine.num_batches_tracked) == 1
    sync.join()  # nothing remembered: nothing to do


def recalibrated(rank):
    generator = torch.Generator().manual_seed(4)
    batches = [torch.randn(8, 4, generator=generator, dtype=torch.float64) for _ in range(6)]
    seed_everything(0, verbose=False)
    one = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    convert_ghost_batchnorm(one, 4)
    wrapped = DistributedDataParallel(copy.deepcopy(one))
    recalibrate_batchnorm(one, batches)
    shares = [batches[:1], batches[1:3], batches[3:4], batches[4:]]
    assert recalibrate_batchnorm(wrapped, shares[rank]) is wrapped
    for name, value in wrapped.module.state_dict().items():
        if "num_batches" in name:
            assert (int(value), int(one.state_dict()[name])) == (12, 12 * RANKS)  # every rank had all batches for one
        else:
            near(value, one.state_dict()[name])


class Net(LightningModule):
    """Its loss is a mean over samples, so DDP's mean over ranks of equal share is the mean over the whole batch."""

    def __init__(self, sharded=False):
        super().__init__()
        self.sharded = sharded
        self.net = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3), Fused(3), nn.Linear(3, 1)
        ).double()

    def configure_model(self):
        if self.sharded:
            fully_shard(self.net[1], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.seen = torch.cat([self.net[i].running_mean for i in (1, 4)])
        self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


STEPS, MICRO = 4, 8


def fit(rank, *, ghost, grouping="contiguous", ranks=RANKS, strategy="ddp", accumulate=1, folder=None, **options):
    """Fit on this rank's part of the batches, or with ``ranks=1`` on the whole; return the final state."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(STEPS, RANKS * MICRO, 4, generator=generator, dtype=torch.float64)
    if ranks > 1:
        x = x[:, rank * MICRO : (rank + 1) * MICRO] if grouping == "contiguous" else x[:, rank::RANKS]
    x = x.flatten(0, 1)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=len(x) // STEPS)
    seed_everything(0, verbose=False)
    model = Net(sharded=isinstance(strategy, ModelParallelStrategy))
    callback = GhostBatchNorm(ghost, grouping=grouping, **options)
    checkpoint = [ModelCheckpoint(folder, every_n_train_steps=STEPS, save_top_k=-1)] if folder else []
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy if ranks > 1 else "auto",
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        callbacks=[callback, *checkpoint],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=bool(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
    )
    trainer.fit(model, loader, loader)
    assert not any(isinstance(layer, GhostNorm) for layer in model.modules())
    state = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in model.state_dict().items()
    }
    return state, model.seen


def compare_fits(rank, **options):
    alone = {k: v for k, v in options.items() if k not in ("sync_running_stats", "ranks_per_ghost", "strategy")}
    state, seen = fit(rank, **options)
    expected, expected_seen = fit(rank, ranks=1, **alone)
    statistics = options.get("sync_running_stats", False)
    for name, value in state.items():
        if statistics is not False or not ("running" in name or "num_batches" in name):
            near(value, expected[name])
    if statistics is not False:
        near(seen, expected_seen)
    return state


def fits_with_spanning_ghosts(rank):
    with patch("torch.distributed.new_group", wraps=dist.new_group) as new_group:
        compare_fits(rank, ghost=16)
        # two pairs of ranks, which every rank creates in the same order
        assert [call.args[0] for call in new_group.call_args_list] == [[0, 1], [2, 3]]
        compare_fits(rank, ghost=16, sync_running_stats=True)
        assert new_group.call_count == 2  # found again
    compare_fits(rank, ghost=16, grouping="strided", sync_running_stats=True)
    compare_fits(rank, ghost=32, accumulate=2)
    compare_fits(rank, ghost=4, sync_running_stats=True)
    compare_fits(rank, ghost=16, ranks_per_ghost=2, running_stats="sequential")
    compare_fits(rank, ghost=16, sync_running_stats=True, recalibrate=2)


def fits_that_fall_short(rank):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(rank, ghost=12)
        fit(rank, ghost=16, ranks_per_ghost=1)
    told = [str(w.message) for w in caught if "plain batch normalization over these 8" in str(w.message)]
    assert len(told) == (2 if rank == 0 else 0), told
    with pytest.raises(MisconfigurationException, match="ranks_per_ghost=3 does not divide the 4 ranks"):
        fit(rank, ghost=16, ranks_per_ghost=3)


def sharded_fits(rank, folder):
    # None: nothing else keeps these ranks equal, so they are joined, and validation sees what one process would
    for ghost in (4, 16):
        for recalibrate in (None, 2):
            strategy = ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1)
            compare_fits(rank, ghost=ghost, strategy=strategy, sync_running_stats=None, recalibrate=recalibrate)


def worker(rank, port, folder):
    enter_world(rank, RANKS, port)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    spanning_ghosts(rank)
    second_derivatives(rank)
    own_forward_spans(rank)
    joined_statistics(rank)
    recalibrated(rank)
    fits_with_spanning_ghosts(rank)
    fits_that_fall_short(rank)
    sharded_fits(rank, folder)
    leave_world()


@pytest.mark.distributed
def test_four_processes_equal_one(tmp_path):
    port = free_port()
    start_processes(worker, (port, str(tmp_path)), RANKS)
