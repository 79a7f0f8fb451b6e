"""Gloo processes, started once for all they do; each writes what it saw, and the tests compare."""

import os

import pytest
import torch
from gloo import enter_world, free_port, leave_world, start_processes
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_gap.diffusion import UltraSlowDiffusion, weight_displacement
from lightning_gap.ranks.shards import shard_copies

WEIGHTS = ("distance", "relative_distance", "weight_norm", "cosine")


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Sharded(Net):
    """The first layer in shards of 4 + 3 rows, the last one in shards of 1 + 0; every batch is the same."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 1))

    def configure_model(self):
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class Reference(Callback):
    """The slow obvious twin: gather all weights after every update, subtract in float64."""

    def __init__(self):
        self.start, self.displacement = None, {}

    @staticmethod
    def whole(module):
        full = {n: p.detach() for n, p in module.named_parameters()}
        return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).double() for n, p in full.items()}

    def on_train_start(self, trainer, pl_module):
        self.start = {name: w.clone() for name, w in self.whole(pl_module).items()}

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.displacement[trainer.global_step] = tuple(weight_displacement(self.whole(pl_module), self.start))


def train(folder, callbacks, model=None, strategy="ddp", max_steps=40, ckpt_path=None, rows=64, **kwargs):
    seed_everything(0, verbose=False)
    x = torch.randn(rows, 4)
    model = Net() if model is None else model
    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=strategy,
        max_epochs=-1,
        max_steps=max_steps,
        callbacks=callbacks,
        logger=CSVLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )
    trainer.fit(model, DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8), ckpt_path=ckpt_path)
    return trainer, model


def ddp(folder):
    def outcome(callbacks):
        trainer, model = train(folder, callbacks)
        return model.state_dict(), float(trainer.callback_metrics["loss"]), torch.get_rng_state()

    plain, diffusion, reference = outcome([]), UltraSlowDiffusion(points_per_decade=10), Reference()
    observed = outcome([diffusion, reference])
    return {"plain": plain, "observed": observed, "trace": diffusion.trace, "reference": reference.displacement}


def sharded(folder, world):
    def run(callbacks, max_steps, ckpt_path=None, **kwargs):
        torch.manual_seed(0)
        strategy = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
        return train(folder, callbacks, Sharded(), strategy, max_steps, ckpt_path, rows=8 * world, **kwargs)[0]

    whole, reference = UltraSlowDiffusion(points_per_decade=10, per_layer=True), Reference()
    run([whole, reference], 40)
    stopped = UltraSlowDiffusion(points_per_decade=10, per_layer=True)
    run([stopped], 13).save_checkpoint(f"{folder}/sharded{world}.ckpt")
    resumed = UltraSlowDiffusion(points_per_decade=10, per_layer=True)
    run([resumed], 40, f"{folder}/sharded{world}.ckpt")
    half, exact = UltraSlowDiffusion(), Reference()
    run([half, exact], 6, precision="bf16-true")
    mesh = init_device_mesh("cpu", (world,))
    split, replicated = (distribute_tensor(torch.ones(4), mesh, [place]) for place in (Shard(0), Replicate()))
    return {
        "trace": whole.trace,
        "resumed": resumed.trace,
        "reference": reference.displacement,
        "bf16": half.trace,
        "bf16 reference": exact.displacement,
        "held": sum(p.numel() for p in resumed._anchor.weights.values()),
        "saved": sorted(stopped.state_dict()),
        "anchor": stopped.state_dict()["anchor"],
        "copies": [shard_copies(p) for p in (split, replicated, torch.ones(4))],
    }


def adopt(folder):
    """Resume in two processes what four processes saved."""
    diffusion, reference = UltraSlowDiffusion(points_per_decade=10, per_layer=True), Reference()
    torch.manual_seed(0)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    train(folder, [diffusion, reference], Sharded(), strategy, 20, f"{folder}/sharded4.ckpt", rows=16)
    return {"trace": diffusion.trace}


def worker(rank, world, port, folder):
    enter_world(rank, world, port)
    seen = {"sharded": sharded(folder, world)}
    if world == 2:
        seen |= {"ddp": ddp(folder), "adopted": adopt(folder)}
    torch.save(seen, f"{folder}/world{world}rank{rank}.pt")
    leave_world()


def start(world, folder):
    port = free_port()
    start_processes(worker, (world, port, str(folder)), world)
    return [torch.load(folder / f"world{world}rank{rank}.pt") for rank in range(world)]


def assert_trace_is_that_of(reference, trace):
    for i, t in enumerate(trace["updates"]):
        assert [trace[name][i] for name in WEIGHTS] == pytest.approx(reference[t], rel=1e-6)


def assert_ddp_is_bit_equal_with_and_without(ranks):
    for seen in (rank["ddp"] for rank in ranks[2]):
        torch.testing.assert_close(seen["observed"], seen["plain"], rtol=0, atol=0)
        assert seen["trace"] == ranks[2][0]["ddp"]["trace"]
        assert seen["trace"]["updates"] == [1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 32, 40]
        assert_trace_is_that_of(seen["reference"], seen["trace"])


def assert_shards_equal_the_whole_weights_in_float64(ranks, world):
    for seen in (rank["sharded"] for rank in ranks[world]):
        assert seen["trace"] == ranks[world][0]["sharded"]["trace"]
        assert len(seen["trace"]["updates"]) == 14
        assert_trace_is_that_of(seen["reference"], seen["trace"])
        assert_trace_is_that_of(seen["bf16 reference"], seen["bf16"])
        layers = [seen["trace"][f"distance/net.{layer}"] for layer in (0, 2)]
        for whole, first, last in zip(seen["trace"]["distance"], *layers, strict=True):
            assert whole == pytest.approx((first**2 + last**2) ** 0.5)
        assert seen["resumed"] == seen["trace"]
        assert seen["saved"] == ["anchor", "anchor_folder", "shapes", "start_squares", "stem", "trace"]
        assert seen["anchor"] is None  # no weights
        assert seen["copies"] == [1, world, world]
    held = {2: [4 * 5 + 8, 3 * 5], 4: [2 * 5 + 8, 2 * 5, 2 * 5, 5]}[world]
    assert [rank["sharded"]["held"] for rank in ranks[world]] == held


def assert_two_processes_resume_what_four_saved(ranks):
    four, two = (ranks[world][0][name]["trace"] for world, name in ((4, "sharded"), (2, "adopted")))
    assert two["updates"] == four["updates"][:11]
    for name in WEIGHTS:  # other batches after update 13, and the same start
        assert two[name][:9] == four[name][:9]
        assert all(a > 0 for a in two[name][9:])


@pytest.mark.distributed
def test_two_and_four_processes(tmp_path):
    """One test, for starting the processes is what takes the time."""
    ranks = {world: start(world, tmp_path) for world in (4, 2)}
    assert_ddp_is_bit_equal_with_and_without(ranks)
    for world in ranks:
        assert_shards_equal_the_whole_weights_in_float64(ranks, world)
    assert_two_processes_resume_what_four_saved(ranks)
