"""`LargeBatchRegime` over `SamplesDataModule`: the batch is read, rates and lengths follow, in processes too."""

import json
import multiprocessing
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gloo import enter_world, free_port, leave_world
from lightning.pytorch import Trainer

from lightning_gap import LargeBatchRegime, MongeMap, SamplesDataModule, effective_batch_size
from lightning_gap.monge import ConditionalMap, ResidualMLP
from lightning_gap.regime.loader import loader_batch_size, samples_in_batch

# Nothing is held out, so that numbers are those of all samples.
pytestmark = pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")

CHEAP = {"fitting_loss": "energy", "gap_weight": 0.0}


def samples(n=250, m=200, **options):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 2, generator=generator), torch.randn(m, 2, generator=generator)
    return SamplesDataModule(x, y, **{"val_fraction": 0.0, "batch_size": 32, **options})


def fit(data, reference=8, network=None, **options):
    torch.manual_seed(0)
    model = MongeMap(map=network or ResidualMLP(2, [4]), optimizer=lambda p: torch.optim.SGD(p, lr=0.01), **CHEAP)
    regime = LargeBatchRegime(reference_batch_size=reference)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "devices": 1, "max_epochs": 2}
    trainer = Trainer(callbacks=[regime], **{**quiet, **options})
    trainer.fit(model, data)
    return trainer, regime.plan


def test_whole_batches_told_in_numpys_integers_are_read():
    loader = SimpleNamespace(samples_in_batch=np.int64(64), batch_size=None)
    assert loader_batch_size(loader) == samples_in_batch(loader) == 64
    assert loader_batch_size(SimpleNamespace(batch_size=np.int32(8))) == 8
    assert samples_in_batch(SimpleNamespace(samples_in_batch="64")) is None


def test_an_epoch_is_a_pass_through_the_larger_set():
    trainer, plan = fit(samples())
    assert effective_batch_size(trainer) == plan.batch_size == 32
    assert (plan.samples, plan.updates_per_epoch, plan.reference_updates_per_epoch) == (250, 7, 31)
    assert trainer.global_step == plan.updates == plan.reference_updates == 62
    assert plan.learning_rates == ((0.01, 0.02),)


@pytest.mark.parametrize("reference", [8, 16])
def test_the_reference_run_is_that_of_the_small_batch(reference):
    small = Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False,
    )  # fmt: skip
    small.fit(MongeMap(map=ResidualMLP(2, [4]), **CHEAP), samples(batch_size=reference))
    _, plan = fit(samples(), reference)
    assert plan.reference_updates == small.global_step


def test_accumulated_batches_count():
    trainer, plan = fit(samples(batch_size=16), accumulate_grad_batches=2)
    assert effective_batch_size(trainer) == plan.batch_size == 32
    assert trainer.global_step == plan.reference_updates == 62


@pytest.mark.parametrize(("per_batch", "batch"), [(None, 48), (2, 32)])
def test_the_conditions_of_a_batch_count(per_batch, batch):
    labels = ["a", "b", "c"] * 30
    data = samples(90, 90, batch_size=16, conditions=(labels, labels), conditions_per_batch=per_batch)
    trainer, plan = fit(data, network=ConditionalMap(2, [4], num_conditions=3))
    assert effective_batch_size(trainer) == plan.batch_size == batch
    assert plan.lr_factor == pytest.approx((batch / 8) ** 0.5)
    assert trainer.global_step == plan.updates


def test_draws_without_end_have_the_epochs_that_are_asked_for():
    def normal(n, generator):
        return torch.randn(n, 2, generator=generator)

    data = SamplesDataModule(normal, normal, batch_size=32, steps_per_epoch=5)
    trainer, plan = fit(data)
    assert (plan.samples, plan.updates_per_epoch, plan.reference_updates_per_epoch) == (160, 5, 20)
    assert trainer.global_step == 40


def work(rank, port, folder):
    enter_world(rank, 2, port)
    trainer, plan = fit(samples(batch_size=16), devices=2, strategy="ddp")
    found = [effective_batch_size(trainer), plan.batch_size, plan.samples, plan.updates_per_epoch, trainer.global_step]
    with open(os.path.join(folder, f"{rank}.json"), "w", encoding="utf-8") as file:
        json.dump([*found, trainer.optimizers[0].param_groups[0]["lr"]], file)
    leave_world()


@pytest.mark.distributed
def test_processes_share_the_batch(tmp_path):
    # The fork of a process that has computed on several threads may hang.
    context = multiprocessing.get_context("fork" if torch.get_num_threads() == 1 else "spawn")
    port = free_port()
    running = [context.Process(target=work, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(180)
    assert [process.exitcode for process in running] == [0, 0]
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [
        [32, 32, 250, 7, 62, 0.02]
    ] * 2
