"""LargeBatchRegime on two and four gloo processes: the plan, the learning rates and the weights of one process."""

import json

import pytest
import torch
from gloo import enter_world, free_port, leave_world, start_processes
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, TensorDataset

from lightning_gap.regime import GradientNoiseScale, LargeBatchRegime, effective_batch_size

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


def records(
    folder,
    batch_size,
    *,
    processes=1,
    samples=60,
    own_sampler=False,
    sampler=None,
    regime=None,
    callbacks=(),
    **options,
):
    folder.mkdir()
    regime = regime or LargeBatchRegime(4)
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=DDPStrategy(start_method="fork", process_group_backend="gloo") if processes > 1 else "auto",
        max_epochs=3,
        callbacks=[*callbacks, regime, Record(folder, regime)],
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
        *records(tmp_path / "four", 3, processes=4, own_sampler=True),
        *records(tmp_path / "both", 3, processes=2, own_sampler=True, accumulate_grad_batches=2),
    ]
    injected = records(tmp_path / "injected", 6, processes=2)  # shuffles
    for record in same + injected:
        for key in ("plan", "rates", "steps", "batch"):
            assert record[key] == alone[key]
    for record in same:
        torch.testing.assert_close(torch.tensor(record["weights"]), torch.tensor(alone["weights"]))


@pytest.mark.parametrize("sampler", [None, lambda data: RandomSampler(data, num_samples=48)])
def test_uneven_shards_keep_the_updates(sampler, tmp_path):
    for record in records(tmp_path / "uneven", 5, processes=2, samples=61, sampler=sampler):
        assert record["steps"] == len(record["rates"]) == 3 * (16 if sampler is None else 12)


def test_a_loader_that_may_or_may_not_be_sharded_is_refused(tmp_path):
    with pytest.raises(Exception, match="use_distributed_sampler=False"):
        records(tmp_path / "refused", 6, processes=2, use_distributed_sampler=False)


def test_the_first_updates_are_those_of_one_process(tmp_path):
    def first():
        return LargeBatchRegime(4, clip_norm=0.2, clip_updates=20, warmup_updates=10)

    (alone,) = records(tmp_path / "alone", 12, regime=first())
    for record in records(tmp_path / "two", 6, processes=2, own_sampler=True, regime=first()):
        assert record["rates"] == alone["rates"]
        torch.testing.assert_close(torch.tensor(record["weights"]), torch.tensor(alone["weights"]))


def test_ranks_draw_different_noise_and_stay_equal(tmp_path):
    class Draws(Callback):
        def on_train_end(self, trainer, pl_module):
            path = tmp_path / f"{trainer.global_rank}.txt"
            noise = noisy._run.running.noise
            path.write_text(f"{noise.seed} {noise.rank} {noise.draws}")

    noisy = LargeBatchRegime(4, lr_rule="none", gradient_noise=True)
    options = {"processes": 2, "own_sampler": True, "callbacks": [Draws()], "accumulate_grad_batches": 2}
    first, second = records(tmp_path / "noise", 3, regime=noisy, **options)
    assert first["weights"] == second["weights"]
    (seed, rank, draws), other = ((tmp_path / f"{r}.txt").read_text().split() for r in range(2))
    assert other == [seed, "1", draws]
    assert (rank, draws) == ("0", "90")
    (plain, _) = records(
        tmp_path / "plain", 3, regime=LargeBatchRegime(4, lr_rule="none"), **{**options, "callbacks": ()}
    )
    assert plain["weights"] != first["weights"]


def test_replicas_measure_the_noise_scale_of_accumulation(tmp_path):
    def measured(name, batch_size, **options):
        class Save(Callback):
            def on_train_end(self, trainer, pl_module):
                (tmp_path / f"{name}{trainer.global_rank}.json").write_text(json.dumps(scale.state_dict()))

        scale = GradientNoiseScale(every_n_updates=2)
        found = records(
            tmp_path / name, batch_size, callbacks=[scale, Save()], own_sampler="processes" in options, **options
        )
        return [json.loads((tmp_path / f"{name}{rank}.json").read_text()) for rank in range(len(found))]

    first, second = measured("two", 6, processes=2)
    (accumulated,) = measured("one", 6, accumulate_grad_batches=2)
    both = measured("both", 3, processes=2, accumulate_grad_batches=2)
    assert first == second
    assert first["measurements"] == accumulated["measurements"] == 23
    # The same 12 samples an update, in other halves: the mean gradient is the same, the halves are not.
    assert accumulated["total_square"] == pytest.approx(first["total_square"], rel=0.5)
    assert both[0] == both[1]
    assert both[0]["measurements"] == 23


@pytest.mark.parametrize("norm", ["l1", "nuclear"])
def test_replicas_measure_dual_norms_of_one_process(tmp_path, norm):
    """Two processes' micro-batches hold the samples of one process's two: the same noise, and the same norms."""

    def measured(name, batch_size, **options):
        class Save(Callback):
            def on_train_end(self, trainer, pl_module):
                (tmp_path / f"{name}{trainer.global_rank}.json").write_text(json.dumps(scale.state_dict()))

        scale = GradientNoiseScale(every_n_updates=2, norm=norm)
        records(tmp_path / name, batch_size, callbacks=[scale, Save()], own_sampler="processes" in options, **options)
        return [json.loads((tmp_path / f"{name}{r}.json").read_text()) for r in range(options.get("processes", 1))]

    def interleaved(ranks, size):
        places = torch.arange(60).view(-1, size, ranks).transpose(1, 2)
        return lambda data: places.flatten().tolist()

    (alone,) = measured("alone", 6, accumulate_grad_batches=2, sampler=interleaved(2, 6))
    two = measured("two", 6, processes=2)
    assert two[0] == two[1]
    assert two[0]["measurements"] == alone["measurements"] == 23
    both = measured("both", 3, processes=2, accumulate_grad_batches=2)
    (four,) = measured("four", 3, accumulate_grad_batches=4, sampler=interleaved(2, 3))
    for found, expected in ((two[0], alone), (both[0], four)):
        for name in ("total_noise", "total_gradient", "total_floor"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4)


@pytest.mark.parametrize("source", ["examples", "replicas"])
def test_replicas_measure_the_noise_scale_of_examples(tmp_path, source):
    """Two processes, unshuffled, see in an update the 12 samples that one sees: the same examples."""

    def measured(name, batch_size, source, **options):
        class Save(Callback):
            def on_train_end(self, trainer, pl_module):
                (tmp_path / f"{name}{trainer.global_rank}.json").write_text(json.dumps(scale.state_dict()))

        scale = GradientNoiseScale(every_n_updates=2, source=source)
        records(tmp_path / name, batch_size, callbacks=[scale, Save()], own_sampler="processes" in options, **options)
        return [json.loads((tmp_path / f"{name}{r}.json").read_text()) for r in range(options.get("processes", 1))]

    (alone,) = measured("alone", 12, "examples")
    two = measured("two", 6, source, processes=2)
    assert two[0] == two[1]
    assert two[0]["measurements"] == alone["measurements"] == 23
    # Micro-batches of replicas have the same mean gradient, and a noisier variance.
    exact = {"rel": 1e-4} if source == "examples" else {"rel": 0.8}
    for name in ("total_variance", "total_square"):
        assert two[0][name] == pytest.approx(alone[name], **exact)
    if source == "examples":
        (both,) = measured("both", 3, source, accumulate_grad_batches=4)
        assert both["total_variance"] == pytest.approx(alone["total_variance"], rel=1e-4)


# ------------------------------------------------------------------------------------------------------------- shards


class Sharded(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1))

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    training_step = Regression.training_step

    def forward(self, x):
        return self.net(x)

    @property
    def layer(self):
        return self.net

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)]


class Outcome(Callback):
    def __init__(self):
        self.rates, self.weights = [], None

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_end(self, trainer, pl_module):
        whole = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in pl_module.parameters())
        self.weights = [p.detach().clone() for p in whole]


def fit(*, strategy="auto", devices=1, batch_size=12, epochs=3, ckpt_path=None):
    outcome = Outcome()
    regime = LargeBatchRegime(4, clip_norm=0.2, warmup_updates=8)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=epochs,
        callbacks=[regime, outcome],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Sharded(), Data(batch_size, 60, devices > 1, None), ckpt_path=ckpt_path)
    return trainer, outcome


def worker(rank, port, folder):
    enter_world(rank, 2, port)

    def sharded(batch_size=6, **options):
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        return fit(strategy=strategy, devices=2, batch_size=batch_size, **options)

    trainer, whole = sharded()
    stopped, _ = sharded(epochs=2)
    stopped.save_checkpoint(f"{folder}/first.ckpt")
    # This strategy restores callbacks after on_fit_start, others before.
    _, rest = sharded(ckpt_path=f"{folder}/first.ckpt")
    _, other = sharded(batch_size=3, ckpt_path=f"{folder}/first.ckpt")
    found = {
        "steps": trainer.global_step,
        "rates": [whole.rates, rest.rates, other.rates],
        "weights": [whole.weights, rest.weights],
    }
    torch.save(found, f"{folder}/rank{rank}.pt")
    leave_world()


def test_shards_train_as_one_process(tmp_path):
    port = free_port()
    start_processes(worker, (port, str(tmp_path)), 2)
    trainer, alone = fit()
    assert trainer.global_step == 45
    for found in (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)):
        whole, rest, other = found["rates"]
        assert found["steps"] == 45
        assert whole == alone.rates
        assert rest == alone.rates[30:]
        # At half the batch from there: the factor sqrt(6 / 4) for sqrt(12 / 4).
        assert other == pytest.approx([rate * (6 / 12) ** 0.5 for rate in alone.rates[30:]])
        for weights in found["weights"]:
            for ours, theirs in zip(weights, alone.weights, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
