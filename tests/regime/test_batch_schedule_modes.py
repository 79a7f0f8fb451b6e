"""BatchSizeSchedule in other precisions, compiled, and under strategies of several processes."""

from functools import partial

import pytest
import torch
from gloo import enter_world, free_port, leave_world, start_processes
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from planned_batches import BASE, STEPS, Planned, reference_at
from regime_runs import EPOCH_SCHEDULES, Regression, loader, run, trainer_of
from torch.distributed.fsdp import fully_shard

from lightning_gap import BatchSizeSchedule

pytestmark = pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*", "ignore:.*callbacks used to create.*")


def test_mixed_precision_with_skipped_updates():
    class Overflows(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if self.trainer.global_step in (0, 10, 11) else loss

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    schedule = EPOCH_SCHEDULES["StepLR"]
    _, reference = run(Regression(schedule), loader(BASE))
    callback = BatchSizeSchedule(STEPS, lr_rule="sqrt", max_device_batch_size=7)
    planned = Planned(callback)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    trainer, trace = run(module := Overflows(schedule), loader(BASE), callback, planned, plugins=plugins)
    assert trainer.global_step == 42
    wanted = torch.tensor(reference_at(planned, reference), dtype=torch.float64)
    torch.testing.assert_close(trace.tensor, wanted, rtol=1e-12, atol=0)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_a_compiled_module_trains_as_the_plain_one():
    class Quiet(Regression):
        def training_step(self, batch, batch_idx):  # Lightning's self.log does not compile
            return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    weights = []
    for wrap in (partial(torch.compile, backend="eager"), lambda module: module):
        module = Quiet(EPOCH_SCHEDULES["CosineAnnealingLR"])
        run(wrap(module), loader(BASE), BatchSizeSchedule(STEPS, max_device_batch_size=7))
        weights.append(module.layer.weight)
    torch.testing.assert_close(*weights)


def test_rates_are_tensors_where_the_optimizer_keeps_tensors():
    def adam(groups, lr):
        return torch.optim.Adam([{**group, "lr": torch.tensor(float(group.get("lr", lr)))} for group in groups])

    _, reference = run(Regression(EPOCH_SCHEDULES["StepLR"]), loader(BASE))
    module = Regression(EPOCH_SCHEDULES["StepLR"], optimizer=adam)
    callback = BatchSizeSchedule(STEPS, lr_rule="sqrt")
    planned = Planned(callback)
    trainer, trace = run(module, loader(BASE), callback, planned)
    assert isinstance(trainer.optimizers[0].param_groups[0]["lr"], torch.Tensor)
    assert trace.rates == [pytest.approx(rates, rel=1e-5) for rates in reference_at(planned, reference)]


def test_a_fast_dev_run_runs():
    trainer, _ = run(Regression(EPOCH_SCHEDULES["StepLR"]), loader(BASE), BatchSizeSchedule(STEPS), fast_dev_run=True)
    assert trainer.global_step == 1


class Shards(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        torch.nn.init.constant_(self.layer.weight, 0.5)
        torch.nn.init.zeros_(self.layer.bias)

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    def train_dataloader(self):
        return loader(BASE, samples=61, shuffle=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)]


def fit(ckpt_path=None, max_epochs=4, **options):
    seed_everything(0, verbose=False)  # which processes of a strategy go back to
    module = Shards()
    trainer = trainer_of(BatchSizeSchedule(STEPS, max_device_batch_size=4), max_epochs=max_epochs, **options)
    trainer.fit(module, ckpt_path=ckpt_path)
    weight = module.layer.weight
    weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return trainer, weight.detach().clone()


def sharded(rank, port, folder):
    enter_world(rank, 2, port)
    strategy = partial(ModelParallelStrategy, data_parallel_size=2, tensor_parallel_size=1)
    trainer, whole = fit(strategy=strategy(), devices=2)
    stopped, _ = fit(strategy=strategy(), devices=2, max_epochs=2)
    stopped.save_checkpoint(f"{folder}/first.ckpt")
    # This strategy restores callbacks after on_fit_start, others before.
    _, rest = fit(strategy=strategy(), devices=2, ckpt_path=f"{folder}/first.ckpt")
    torch.save({"steps": trainer.global_step, "weights": [whole, rest]}, f"{folder}/rank{rank}.pt")
    leave_world()


@pytest.mark.distributed
def test_shards_train_as_one_process(tmp_path):
    start_processes(sharded, (free_port(), str(tmp_path)), 2)
    trainer, alone = fit()
    for found in (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)):
        assert found["steps"] == trainer.global_step
        for weights in found["weights"]:
            torch.testing.assert_close(weights, alone)
