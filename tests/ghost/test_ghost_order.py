"""Two gloo processes that meet ghost layers in different orders: an error that names the layers, soon, and no hang."""

import time
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from gloo import enter_world, free_port, leave_world, start_processes
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gap.ghost import GhostBatchNorm, convert_ghost_batchnorm
from lightning_gap.trainer.strategy import _subgroup

RANKS, TIMEOUT = 2, 20


class TwoHeads(LightningModule):
    """The ranks take turns with two domains, each with a norm of its own."""

    def __init__(self, widths):
        super().__init__()
        self.stem = nn.ModuleList(nn.Linear(8, width) for width in widths)
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in widths)
        self.heads = nn.ModuleList(nn.Linear(width, 2) for width in widths)

    def training_step(self, batch, batch_idx):
        domain = (batch_idx + self.global_rank) % 2
        x = self.heads[domain](self.norms[domain](self.stem[domain](batch[0])))
        return nn.functional.cross_entropy(x, batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(model, ghost):
    loader = DataLoader(TensorDataset(torch.randn(64, 8), torch.arange(64) % 2), batch_size=16)
    trainer = Trainer(
        accelerator="cpu", devices=RANKS, max_epochs=1, callbacks=[GhostBatchNorm(ghost)], logger=False,
        strategy=DDPStrategy(
            process_group_backend="gloo", find_unused_parameters=True, timeout=timedelta(seconds=TIMEOUT)
        ),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, loader)


def worker(rank, port):
    enter_world(rank, RANKS, port)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, timeout=timedelta(seconds=TIMEOUT))

    with patch("torch.distributed.new_group", wraps=dist.new_group) as new_group:
        for widths in ((8, 8), (4, 8)):
            start = time.monotonic()
            names = r"rank 0 at 'norms.0', rank 1 at 'norms.1': use ranks_per_ghost=1"
            with pytest.raises(RuntimeError, match=f"reach their layers in the same order, and here is {names}"):
                fit(TwoHeads(widths), 2 * 16)
            assert time.monotonic() - start < TIMEOUT  # told, not timed out
        assert not new_group.called  # the group of all ranks is there
    fit(TwoHeads((4, 8)), 16)  # within each rank: nothing to agree on

    layers = convert_ghost_batchnorm(
        nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(2))), 8, process_group=dist.group.WORLD
    )
    with pytest.raises(RuntimeError, match="rank 0 at '0', rank 1 at '1'"):
        layers[rank](torch.randn(4, 3))
    with pytest.raises(RuntimeError, match="rank 0 at '0', rank 1 at '1'"):  # transforms take the formula
        torch.func.jvp(layers[rank], *[(torch.randn(4, 3),)] * 2)

    part = _subgroup(dist.group.WORLD, ((0,), (1,)))
    assert part._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=TIMEOUT)
    leave_world()


@pytest.mark.distributed
def test_ranks_that_meet_other_layers_are_told():
    start_processes(worker, (free_port(),), RANKS)
