"""LargeBatchRegime on two gloo processes: the plan, the learning rates and the weights of one process."""

import json

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, TensorDataset

from lightning_gap.regime import LargeBatchRegime, effective_batch_size

pytestmark = pytest.mark.distributed


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        torch.nn.init.constant_(self.layer.weight, 0.5)
        torch.nn.init.zeros_(self.layer.bias)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)]


class Record(Callback):
    """Write, on every rank, the plan, each update's learning rate, and the last weights."""

    def __init__(self, folder, regime):
        self.folder, self.regime, self.rates = folder, regime, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_end(self, trainer, pl_module):
        record = {
            "plan": self.regime.plan.to_dict(),
            "rates": self.rates,
            "weights": pl_module.layer.weight.flatten().tolist(),
            "steps": trainer.global_step,
            "batch": effective_batch_size(trainer),
        }
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(record))


class Data(LightningDataModule):
    """Unshuffled, sharded by its own sampler where asked, by the trainer's otherwise."""

    def __init__(self, batch_size, samples, own_sampler, sampler):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(samples, 4, generator=generator)
        self.dataset = TensorDataset(x, x.sum(1, keepdim=True))
        self.batch_size, self.own_sampler, self.sampler = batch_size, own_sampler, sampler

    def train_dataloader(self):
        sampler = self.sampler and self.sampler(self.dataset)
        if self.own_sampler:
            sampler = DistributedSampler(self.dataset, shuffle=False)
        return DataLoader(self.dataset, batch_size=self.batch_size, sampler=sampler)


def records(folder, batch_size, *, processes=1, samples=60, own_sampler=False, sampler=None, **options):
    folder.mkdir()
    regime = LargeBatchRegime(4)
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=DDPStrategy(start_method="fork", process_group_backend="gloo") if processes > 1 else "auto",
        max_epochs=3,
        callbacks=[regime, Record(folder, regime)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(Regression(), Data(batch_size, samples, own_sampler, sampler))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


def test_replicas_and_accumulation_make_the_plan_of_one_large_batch(tmp_path):
    (alone,) = records(tmp_path / "alone", 12)
    assert (alone["steps"], alone["batch"]) == (45, 12)
    same = [
        *records(tmp_path / "accumulated", 3, accumulate_grad_batches=4),
        *records(tmp_path / "replicas", 6, processes=2, own_sampler=True),
        *records(tmp_path / "both", 3, processes=2, own_sampler=True, accumulate_grad_batches=2),
    ]
    injected = records(tmp_path / "injected", 6, processes=2)  # shuffles
    for record in same + injected:
        for key in ("plan", "rates", "steps", "batch"):
            assert record[key] == alone[key]
    for record in same:
        torch.testing.assert_close(torch.tensor(record["weights"]), torch.tensor(alone["weights"]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("sampler", [None, lambda data: RandomSampler(data, num_samples=48)])
def test_uneven_shards_keep_the_updates(sampler, tmp_path):
    for record in records(tmp_path / "uneven", 5, processes=2, samples=61, sampler=sampler):
        assert record["steps"] == len(record["rates"]) == 3 * (16 if sampler is None else 12)


def test_a_loader_that_may_or_may_not_be_sharded_is_refused(tmp_path):
    with pytest.raises(Exception, match="use_distributed_sampler=False"):
        records(tmp_path / "refused", 6, processes=2, use_distributed_sampler=False)
