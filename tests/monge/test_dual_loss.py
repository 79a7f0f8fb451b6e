"""The semi-dual as a loss: of maps with a potential, on several processes as on one."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from monge_runs import fit_batch, gaussians, trainer, weights
from torch import nn
from torch.optim import Adam

from lightning_gap import MongeMap, SamplesDataModule
from lightning_gap.monge import BrenierMap, ResidualMLP
from lightning_gap.monge.dual_loss import check_convex, semidual_loss
from lightning_gap.monge.samples.batches import UnpairedBatch


def model(**options) -> MongeMap:
    torch.manual_seed(0)
    net = BrenierMap(2, (8,), start="gaussian")
    return MongeMap(map=net, **{"optimizer": partial(Adam, lr=1e-3), **options})


class Record(Callback):
    """Writes each step's loss, the last weights and the held-out loss of a rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(trainer.callback_metrics["lightning_gap/monge/train_loss"]))

    def on_train_end(self, trainer, pl_module):
        held_out = float(trainer.callback_metrics["lightning_gap/monge/val_semidual"])
        torch.save((self.losses, weights(pl_module), held_out), self.folder / f"{trainer.global_rank}.pt")


def run(folder: Path, devices: int, weighted: bool):
    folder.mkdir()
    draws = torch.Generator().manual_seed(5)
    shares = tuple(torch.rand(160, generator=draws) + 0.05 for _ in range(2)) if weighted else None
    data = SamplesDataModule(*gaussians(160), batch_size=32 // devices, val_fraction=0.2, weights=shares)
    several = {"strategy": "ddp_fork", "devices": devices} if devices > 1 else {}
    trainer(max_epochs=2, num_sanity_val_steps=0, callbacks=[Record(folder)], **several).fit(model(), data)
    return [torch.load(folder / f"{rank}.pt") for rank in range(devices)]


@pytest.mark.distributed
@pytest.mark.parametrize("weighted", [False, True])
def test_two_processes_train_as_one_does(tmp_path, weighted):
    ((expected, expected_weights, expected_held_out),) = run(tmp_path / "one", 1, weighted)
    every = run(tmp_path / "two", 2, weighted)
    assert len(expected) == 8
    for losses, values, held_out in every:
        assert torch.tensor(sum(losses) / 8) == pytest.approx(sum(expected) / 8, rel=0.2)
        assert held_out == pytest.approx(expected_held_out, rel=1e-3)
        for name, value in values.items():
            torch.testing.assert_close(value, expected_weights[name], rtol=1e-3, atol=1e-4)


def test_at_best_it_is_minus_half_the_squared_distance():
    net = model()
    x = gaussians(200)[0]
    y = x + torch.tensor([3.0, -1.0])
    net.map.start(x, y)
    loss = float(semidual_loss(net, UnpairedBatch(x, y)).detach())
    assert loss == pytest.approx(-5.0, rel=1e-2)


def test_maps_without_a_potential_are_refused_before_anything_is_made():
    for net in (ResidualMLP(2), nn.Linear(2, 2)):
        refused = MongeMap(map=net, fitting_loss="semidual")
        with pytest.raises(ValueError, match=r"needs a map with a convex potential, .* give map=BrenierMap"):
            fit_batch(refused, gaussians(20))
        assert not refused.epsilons.started


def test_soft_marginals_are_refused():
    with pytest.raises(ValueError, match="rho softens"):
        MongeMap(2, fitting_loss="semidual", rho=1.0)


@pytest.mark.parametrize("given", [False, True])
def test_weights_that_are_sharded_take_the_energy_distance(given, monkeypatch):
    net = model(**({"fitting_loss": "semidual"} if given else {}))
    monkeypatch.setattr(net, "_trainer", SimpleNamespace(strategy=SimpleNamespace()))
    monkeypatch.setattr(type(net), "trainer", property(lambda self: self._trainer), raising=False)
    if given:
        with pytest.raises(MisconfigurationException, match=r"shards them: give fitting_loss='energy'"):
            check_convex(net)
        return
    check_convex(net)
    assert net.objective.fitting_loss == net.hparams["fitting_loss"] == "energy"
