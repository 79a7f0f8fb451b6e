"""Parameters of every kind: made late, changed, unfrozen or gone in the course of training."""

import pytest
import torch
from diffusion_runs import Net, Reference, fit, loader
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_gap import GhostBatchNorm, GradientNoiseScale, LargeBatchRegime
from lightning_gap.diffusion import (
    UltraSlowDiffusion,
    WeightDistance,
    estimate_alpha,
    tracked_parameters,
)


class Odd(Net):
    """A network whose parameters are of a kind that is made, changed or added in the course of training."""

    kind = "plain"

    def __init__(self):
        super().__init__()
        if self.kind == "lazy":
            self.net = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(1))
        elif self.kind == "lazy head never reached":
            self.head = nn.LazyLinear(3)
        elif self.kind == "frozen":
            self.net[0].requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def on_train_epoch_start(self):
        if self.kind == "another dtype" and self.current_epoch == 1:
            self.double()

    def training_step(self, batch, batch_idx):
        x, y = (tensor.to(self.net[-1].bias.dtype) for tensor in batch)
        return nn.functional.mse_loss(self.net(x), y)


class LateReference(Reference):
    """Copies the weights before the first update, when lazy ones have been made."""

    @staticmethod
    def vector(module):
        return torch.cat([p.detach().double().flatten() for p in module.net.parameters() if p.requires_grad])

    def on_train_start(self, trainer, pl_module):
        pass

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.start is None:
            self.start = self.vector(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        if self.start is not None:
            super().on_train_batch_end(trainer, pl_module)


@pytest.mark.parametrize("regime", [False, True], ids=["alone", "with the others"])
@pytest.mark.parametrize("kind", ["plain", "lazy", "lazy head never reached", "frozen", "another dtype"])
def test_parameters_of_every_kind_are_measured_from_where_they_started(tmp_path, monkeypatch, kind, regime):
    monkeypatch.setattr(Odd, "kind", kind)
    diffusion, reference = UltraSlowDiffusion(points_per_decade=5, per_layer=True), LateReference()
    others = [LargeBatchRegime(8), GradientNoiseScale(every_n_updates=1), GhostBatchNorm(4)] if regime else []
    options = {"accumulate_grad_batches": 2, "max_epochs": 3} if regime else {"max_epochs": 3}
    fit(tmp_path, diffusion, reference, *others, model=Odd(), logger=CSVLogger(tmp_path), **options)
    trace = diffusion.trace
    assert trace["updates"][:4] == [1, 2, 3, 4]
    assert trace["distance"] == pytest.approx([reference.distances[t] for t in trace["updates"]], rel=1e-5)
    assert ("distance/net.0" in trace) == (kind != "frozen")
    assert not any(name.endswith("head") for name in trace)


def test_a_lazy_run_resumes_as_the_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(Odd, "kind", "lazy")
    whole, part, resumed = (UltraSlowDiffusion(points_per_decade=5) for _ in range(3))
    data = loader(shuffle=False)
    fit(tmp_path, whole, model=Odd(), data=data, max_epochs=4)
    run, _ = fit(tmp_path, part, model=Odd(), data=data, max_epochs=2)
    run.save_checkpoint(tmp_path / "half.ckpt")
    fit(tmp_path, resumed, model=Odd(), data=data, max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.trace == whole.trace


@pytest.mark.parametrize("module", [nn.LazyLinear(2), nn.Linear(2, 2, device="meta")])
def test_parameters_without_values_are_refused_with_a_remedy(module):
    for read in (tracked_parameters, WeightDistance, lambda module: estimate_alpha(module, lambda m: 0, radius=1.0)):
        with pytest.raises(ValueError, match=r"no values yet: weight.*Run a batch .*materialize .*exclude"):
            read(module)
    assert tracked_parameters(module, exclude="") == {}


def test_parameters_unfrozen_later_are_left_out_with_one_warning(tmp_path):
    class Unfreeze(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.net[0].requires_grad_(trainer.current_epoch > 0)

    model = Net()
    model.net[0].requires_grad_(False)
    diffusion = UltraSlowDiffusion()
    with pytest.warns(UserWarning, match=r"leaves out 2 parameters.*net\.0\.weight") as caught:
        fit(tmp_path, Unfreeze(), diffusion, model=model, max_epochs=3)
    assert len([w for w in caught if "leaves out" in str(w.message)]) == 1
    assert "net.0.weight" not in diffusion.state_dict()["anchor"]


def test_parameters_that_vanish_stop_the_recording_not_the_run(tmp_path):
    class Cut(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.net[4].bias = None

    diffusion = UltraSlowDiffusion()
    with pytest.warns(UserWarning, match=r"stops recording at update 11.*net\.4\.bias"):
        run, _ = fit(tmp_path, Cut(), diffusion, max_epochs=3)
    assert run.global_step == 30
    assert diffusion.trace["updates"] == list(range(1, 11))
