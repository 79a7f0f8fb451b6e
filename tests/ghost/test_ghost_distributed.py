"""Two gloo processes, started once: each writes what it ended with, and the test compares with one process."""

import pytest
import torch
from gloo import enter_world, free_port, leave_world, start_processes
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gap.ghost import GhostBatchNorm, GhostNorm

RANKS, GHOST, BATCH, STEPS = 2, 4, 8, 3


class Net(LightningModule):
    """Its loss is a mean over samples, so DDP's mean over ranks of equal share is the mean over the whole batch."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def samples():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(STEPS, RANKS * BATCH, 4, generator=generator, dtype=torch.float64)


def fit(x, batch_size, **options):
    seed_everything(0, verbose=False)
    model = Net()
    options = {"grouping": "contiguous"} | options
    trainer = Trainer(
        accelerator="cpu",
        devices=options.pop("devices", 1),
        strategy=options.pop("strategy", "auto"),
        sync_batchnorm=options.pop("sync_batchnorm", False),
        max_epochs=2,
        callbacks=[GhostBatchNorm(GHOST, **options)],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=batch_size)
    trainer.fit(model, loader, loader)
    assert not any(isinstance(layer, GhostNorm) for layer in model.modules())
    return model.state_dict()


def shard(rank, grouping):
    """A rank's part of each batch: a block of it, or every second sample, as a distributed sampler deals them out."""
    x = samples()
    part = x[:, rank * BATCH : (rank + 1) * BATCH] if grouping == "contiguous" else x[:, rank::RANKS]
    return part.flatten(0, 1)


def worker(rank, port, folder):
    enter_world(rank, RANKS, port)
    ddp = {"devices": RANKS, "strategy": "ddp"}
    results = {
        grouping: fit(shard(rank, grouping), BATCH, grouping=grouping, **ddp) for grouping in ("contiguous", "strided")
    }
    results["recalibrated"] = fit(shard(rank, "contiguous"), BATCH, recalibrate=STEPS, **ddp)
    try:
        fit(shard(rank, "contiguous"), BATCH, sync_batchnorm=True, **ddp)
    except MisconfigurationException as error:
        results["sync_batchnorm"] = str(error)
    torch.save(results, f"{folder}/rank{rank}.pt")
    leave_world()


@pytest.mark.distributed
def test_two_processes_equal_one_on_the_same_batches(tmp_path):
    port = free_port()
    start_processes(worker, (port, str(tmp_path)), RANKS)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(RANKS)]

    for grouping in ("contiguous", "strided"):
        one = fit(samples().flatten(0, 1), RANKS * BATCH, grouping=grouping)
        for rank in ranks:
            for name, value in rank[grouping].items():
                torch.testing.assert_close(value, ranks[0][grouping][name], rtol=0, atol=0)
                if "running" not in name and "num_batches" not in name:
                    torch.testing.assert_close(value, one[name], rtol=1e-10, atol=1e-12)
        # Buffers are those of rank 0, as with plain BatchNorm: its two ghosts of every batch.
        assert int(ranks[0][grouping]["net.1.num_batches_tracked"]) == 2 * STEPS * BATCH // GHOST
    one = fit(samples().flatten(0, 1), RANKS * BATCH, recalibrate=STEPS)
    for rank in ranks:  # each had its part of the data, and all have the average over all
        for name, value in rank["recalibrated"].items():
            if "num_batches" not in name:
                torch.testing.assert_close(value, one[name], rtol=1e-10, atol=1e-12)
    assert all("sync_batchnorm=True would replace" in rank["sync_batchnorm"] for rank in ranks)
