"""MongeMap on several processes: the terms are those of the global batch."""

from functools import partial
from pathlib import Path

import pytest
import torch
from gloo import enter_world, free_port, leave_world, start_processes
from lightning.pytorch import Callback
from monge_runs import gaussians, small, trainer, weights
from torch import distributed as dist
from torch.optim import Adam

from lightning_gap import SamplesDataModule
from lightning_gap.ranks.group import RankGroup

# At a larger rate the rounding of sums over ranks grows from step to step.
SLOWLY = partial(Adam, lr=1e-3)


class Record(Callback):
    """Writes each step's loss and the last weights of a rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(trainer.callback_metrics["lightning_gap/monge/train_loss"]))

    def on_train_end(self, trainer, pl_module):
        torch.save((self.losses, weights(pl_module)), self.folder / f"{trainer.global_rank}.pt")


def run(folder: Path, devices: int, steps: int, **options) -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    """Train on a global batch of 32 and return what each rank recorded."""
    folder.mkdir()
    data = SamplesDataModule(*gaussians(160), batch_size=32 // devices, val_fraction=0.2)
    several = {"strategy": "ddp_fork", "devices": devices} if devices > 1 else {}
    trainer(max_steps=steps, max_epochs=-1, callbacks=[Record(folder)], **several).fit(
        small(**{"optimizer": SLOWLY, **options}), data
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(devices)]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("devices", "steps"),
    [pytest.param(2, 12), pytest.param(2, 50, marks=pytest.mark.slow), pytest.param(4, 50, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("options", [{}, {"rho": 50.0, "reweight": True}, {"gap_reference": gaussians(90)[0]}])
def test_several_processes_train_as_one_does(tmp_path, devices, steps, options):
    ((expected, expected_weights),) = run(tmp_path / "one", 1, steps, **options)
    every = run(tmp_path / "several", devices, steps, **options)
    assert len(expected) == steps
    assert expected[-1] < expected[0]
    for losses, values in every:
        # The plan that reweights is solved to a coarser tolerance.
        assert losses == pytest.approx(expected, rel=1e-3 if "reweight" in options else 1e-5)
        for name, value in values.items():
            torch.testing.assert_close(value, expected_weights[name], rtol=1e-3, atol=1e-4)


@pytest.mark.distributed
def test_each_device_compares_its_own_batch_on_request(tmp_path):
    ((one, _),) = run(tmp_path / "one", 1, 3)
    every = run(tmp_path / "several", 2, 3, global_batch=False)
    assert every[0][0][0] != pytest.approx(one[0], rel=1e-3)
    for name, value in every[0][1].items():
        torch.testing.assert_close(value, every[1][1][name])


def gather(rank: int, ranks: int, port: int, folder: str) -> None:
    enter_world(rank, ranks, port)
    dist.init_process_group("gloo")
    rows = torch.arange(6.0, dtype=torch.float64).reshape(3, 2)
    mine = rows[:1] if rank == 0 else rows[1:]
    mine = mine.clone().requires_grad_()
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
    gathered = RankGroup().gather_rows(mine)
    (gathered.square() * weight).sum().backward()
    by_column = RankGroup().gather_rows(mine.detach().T, 1)
    torch.save((gathered.detach(), mine.grad, by_column), f"{folder}/{rank}.pt")
    leave_world()


@pytest.mark.distributed
def test_rows_of_unequal_numbers_are_gathered_with_their_gradient(tmp_path):
    start_processes(gather, (2, free_port(), str(tmp_path)), 2)
    rows = torch.arange(6.0, dtype=torch.float64).reshape(3, 2)
    gradient = 2 * rows * torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
    for rank, part in ((0, slice(0, 1)), (1, slice(1, 3))):
        gathered, grad, by_column = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(gathered, rows)
        assert torch.equal(by_column, rows.T)
        assert torch.equal(grad, 2 * gradient[part])  # the sum over both ranks' losses


class FirstEpsilons(Callback):
    """Writes a rank's epsilons and weights as they are after the first update, and the scores at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not batch_idx:
            self.first = weights(pl_module)

    def on_train_end(self, trainer, pl_module):
        scores = {name: float(value) for name, value in trainer.callback_metrics.items() if "/val_" in name}
        torch.save((self.first, scores), self.folder / f"{trainer.global_rank}.pt")


def weighted(folder: Path, devices: int, **options) -> list[tuple[dict[str, torch.Tensor], dict[str, float]]]:
    folder.mkdir()
    draws = torch.Generator().manual_seed(5)
    shares = tuple(torch.rand(160, generator=draws) + 0.05 for _ in range(2))
    data = SamplesDataModule(*gaussians(160), batch_size=32 // devices, val_fraction=0.2, weights=shares)
    several = {"strategy": "ddp_fork", "devices": devices} if devices > 1 else {}
    run = trainer(callbacks=[FirstEpsilons(folder)], num_sanity_val_steps=0, limit_train_batches=2, **several)
    run.fit(small(**options), data)
    return [torch.load(folder / f"{rank}.pt") for rank in range(devices)]


@pytest.mark.distributed
def test_weighted_samples_are_scored_on_several_processes_as_on_one(tmp_path):
    ((_, expected),) = weighted(tmp_path / "one", 1)
    assert expected
    for _, scores in weighted(tmp_path / "several", 2):
        assert scores == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.distributed
def test_devices_that_compare_their_own_batches_begin_alike(tmp_path):
    first, second = (values for values, _ in weighted(tmp_path / "two", 2, global_batch=False))
    for name in ("fitting_epsilon", "gap_epsilon"):
        assert torch.equal(first[name], second[name]), name
