"""Ghost batch normalization on a device: the kernels that CUDA takes give what the CPU's do."""

from itertools import product

import pytest
import torch
from comparison import near
from ranks import RecordedRanks
from torch import nn

from lightning_gap import convert_ghost_batchnorm, recalibrate_batchnorm, revert_ghost_batchnorm
from lightning_gap.ghost import GhostBatchNorm1d, RunningStatisticsSync, ghost_batch_norm

CHANNELS = 3
SIZES = {"features": (), "sequence": (5,), "image": (4, 3), "volume": (2, 3, 2), "large image": (96, 96)}
# Of ghosts of 4: full ones, a smaller last one, a lone last sample, one ghost, one smaller ghost.
BATCHES = {kind: [12] if kind == "large image" else [12, 10, 9, 4, 3] for kind in SIZES}
FORMATS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "strided view": lambda x: x.repeat_interleave(2, -1)[..., ::2] if x.dim() > 2 else x.t().contiguous().t(),
}
SHARES = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def run(x, upstream, dtype, device, *, affine=True, momentum=0.1, **options):
    """Return output, gradients and statistics, on the CPU."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    weight, bias = (torch.rand(2, CHANNELS, generator=generator) + 0.5).to(device, wide)
    leaves = [t.detach().requires_grad_() for t in (x.to(device, dtype), *((weight, bias) if affine else ()))]
    mean, var = torch.zeros(2, CHANNELS, device=device, dtype=wide)
    updates = torch.tensor(3, device=device)
    y = ghost_batch_norm(leaves[0], mean, var, *leaves[1:], momentum=momentum, num_batches_tracked=updates, **options)
    gradients = torch.autograd.grad(y, leaves, upstream.to(device, dtype))
    assert y.device.type == torch.device(device).type
    return [t.detach().cpu() for t in (y, *gradients, mean, var)], int(updates)


def data(n, kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, CHANNELS, *SIZES[kind], generator=generator) + 1


@pytest.mark.parametrize("dtype", SHARES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kind", SIZES)
def test_kernels(device, kind, dtype):
    settings = list(product(FORMATS, ("contiguous", "strided"), ("sequential", "per_step"), (0.1, None)))
    for n in BATCHES[kind]:
        x, upstream = data(n, kind)
        for index, (form, grouping, running_stats, momentum) in enumerate(
            settings[:: 4 if kind == "large image" else 1]
        ):
            options = {
                "ghost_batch_size": 4,
                "grouping": grouping,
                "running_stats": running_stats,
                "momentum": momentum,
                "affine": index % 5 > 0,
            }
            expected, updates = run(FORMATS[form](x), upstream, dtype, "cpu", **options)
            found, updates_there = run(FORMATS[form](x), upstream, dtype, device, **options)
            assert updates_there == updates
            for mine, theirs in zip(found, expected, strict=True):
                near(mine, theirs, SHARES[dtype])


def test_evaluation_and_second_derivatives(device):
    layer = GhostBatchNorm1d(CHANNELS, ghost_batch_size=4)
    x = data(8, "features")[0]
    results = []
    for where in ("cpu", device):
        layer.to(where).train()
        leaf = x.to(where).requires_grad_()
        (gradient,) = torch.autograd.grad(layer(leaf).pow(3).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), leaf)
        results.append([second.cpu(), layer.eval()(leaf).detach().cpu()])
        layer.reset_running_stats()
    near(results[1][0], results[0][0], 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["features", "sequence", "image", "volume"])
def test_ghosts_over_ranks(device, kind, form, dtype):
    for sizes in ([4, 4], [3, 5, 1], [6, 0, 2]):
        x, upstream = data(sum(sizes), kind)
        x = 2 * x + 3  # a mean far from the reciprocal of the deviation
        expected, _ = run(x, upstream, dtype, "cpu", ghost_batch_size=99)
        ranks = RecordedRanks(len(sizes))
        own, own_upstream = FORMATS[form](x).split(sizes), upstream.split(sizes)

        def of_rank(rank, ranks=ranks, own=own, own_upstream=own_upstream):
            options = {"ghost_batch_size": 99, "process_group": ranks}
            return run(own[rank], own_upstream[rank], dtype, device, **options)[0]

        y, grad_x, grad_weight, grad_bias, mean, var = zip(*ranks.each(of_rank, calls=2), strict=True)
        near(torch.cat(y), expected[0], SHARES[dtype])
        near(torch.cat(grad_x), expected[1], 2 * SHARES[dtype])
        near(sum(grad_weight), expected[2], 2 * SHARES[dtype])
        near(sum(grad_bias), expected[3], 2 * SHARES[dtype])
        for each in mean:
            near(each, expected[4], SHARES[dtype])
        for each in var:
            near(each, expected[5], SHARES[dtype])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_of_ranks_are_joined(device, momentum):
    results = []
    for where in ("cpu", device):
        ranks = RecordedRanks(2)

        def of_rank(rank, where=where, ranks=ranks):
            layer = GhostBatchNorm1d(CHANNELS, momentum=momentum, ghost_batch_size=4).to(where)
            sync = RunningStatisticsSync([layer], ranks, range(2))
            sync.remember()
            layer(data(8, "features", seed=rank)[0].to(where))
            sync.join()
            return [buffer.cpu() for buffer in layer.buffers()]

        results.append(ranks.each(of_rank, calls=1))
    for mine, theirs in zip(results[1][0], results[0][0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_conversion_keeps_the_device(device):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(64)).to(device)
    model(torch.rand(4, 3, 6, 6, device=device))
    convert_ghost_batchnorm(model, 4)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cuda"}
    model(torch.rand(12, 3, 6, 6, device=device)).sum().backward()
    recalibrate_batchnorm(model, [torch.rand(8, 3, 6, 6, device=device) for _ in range(2)])
    revert_ghost_batchnorm(model)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cuda"}


@pytest.mark.emulated  # a real GPU fails for good
def test_ranks_at_other_layers_fail(device):
    ranks = RecordedRanks(2)
    ranks.layers = ["first", "second"]

    def of_rank(rank):
        ranks.layer = rank
        return run(*data(4, "features"), torch.float32, device, ghost_batch_size=8, process_group=ranks)

    with pytest.raises(RuntimeError, match="must reach their layers in the same order: this one is at 'second'"):
        ranks.each(of_rank, calls=2)
