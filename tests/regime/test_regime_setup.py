"""Modules and data modules that make their data in ``setup`` or ``prepare_data``."""

import copy
import math

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regime_runs import Regression, SaveAt, dataset, loader, run
from torch.utils.data import DataLoader

from lightning_gap import GhostBatchNorm, GradientNoiseScale, UltraSlowDiffusion
from lightning_gap.regime import LargeBatchRegime

pytestmark = pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*")


class InSetup(Regression):
    """Makes its samples in ``setup``, which Lightning calls after the callbacks'."""

    batch = 30

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.layer = torch.nn.Sequential(torch.nn.BatchNorm1d(4), self.layer)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)

    def setup(self, stage):
        self.samples = dataset()

    def train_dataloader(self):
        return DataLoader(self.samples, batch_size=self.batch)


class InPrepareData(InSetup):
    def setup(self, stage):
        pass

    def prepare_data(self):
        self.samples = dataset()


class Data(LightningDataModule):
    def setup(self, stage):
        self.samples = dataset()

    def train_dataloader(self):
        return DataLoader(self.samples, batch_size=30)


def test_the_learning_rate_alone_waits_for_the_data():
    for module in (InSetup(), InPrepareData()):
        regime = LargeBatchRegime(4, train_longer=False)
        trainer, trace = run(module, None, regime, max_epochs=3)
        assert trainer.global_step == 6
        torch.testing.assert_close(trace.tensor, torch.full((6, 1), 1e-3 * math.sqrt(7.5), dtype=torch.float64))
        trainer.fit(InSetup())  # with a plan of its own
        assert regime.plan.batch_size == 30
    _, given = run(InSetup(), None, LargeBatchRegime(4, batch_size=30, train_longer=False), max_epochs=1)
    assert given.tensor[0, 0] == trace.tensor[0, 0]


def test_a_length_is_planned_once_the_data_are_there():
    for module, data in (
        (InSetup(), None),
        (InPrepareData(), None),
        (Regression(), Data()),
        (Regression(), loader(30)),
    ):
        trainer, _ = run(module, data, LargeBatchRegime(4))
        assert (trainer.global_step, trainer.max_epochs) == (90, 6)
    _, trace = run(InSetup(), None, LargeBatchRegime(4, batch_size=30), max_steps=5, max_epochs=-1)
    assert len(trace.rates) == 5
    with pytest.raises(MisconfigurationException, match=r"LightningDataModule.*train_longer=False"):
        run(InSetup(), None, LargeBatchRegime(4, stretch_schedulers=False))  # the limits are to be there before setup


@pytest.mark.parametrize("longer", [False, 0.5, True])
def test_it_resumes_bit_for_bit(longer, tmp_path):
    def regime(reference=4):
        return LargeBatchRegime(reference, train_longer=longer, warmup_updates=5, clip_norm=0.5)

    save = SaveAt(tmp_path)
    _, whole = run(straight := InSetup(), None, regime(), save, max_epochs=4)
    for step in save.saved[:-1]:
        _, rest = run(module := InSetup(), None, regime(), max_epochs=4, ckpt_path=tmp_path / f"{step}.ckpt")
        assert rest.rates == whole.rates[step:]
        for name, value in straight.state_dict().items():
            assert torch.equal(value, module.state_dict()[name])


def test_a_checkpoint_of_another_regime_is_refused_all_the_same(tmp_path):
    for name, callbacks in (("scaled", [LargeBatchRegime(4, train_longer=False)]), ("plain", [])):
        trainer, _ = run(InSetup(), None, *callbacks, max_epochs=1)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
    for name, words in (("scaled", "of another regime"), ("plain", "without LargeBatchRegime")):
        with pytest.raises(MisconfigurationException, match=words):
            run(InSetup(), None, LargeBatchRegime(5, train_longer=False), ckpt_path=tmp_path / f"{name}.ckpt")


def test_an_error_of_the_loader_itself_is_its_own():
    class Broken(InSetup):
        def train_dataloader(self):
            raise KeyError("no such column")

    with pytest.raises(KeyError, match="no such column"):
        run(Broken(), None, LargeBatchRegime(4, train_longer=False))


def test_the_other_callbacks_wait_for_the_data_too():
    module = InSetup()
    module.batch = 10
    scale, diffusion = GradientNoiseScale(every_n_updates=1), UltraSlowDiffusion()
    run(module, None, GhostBatchNorm(5), scale, diffusion, max_epochs=2, accumulate_grad_batches=2)
    assert scale.estimate.measurements == 6
    assert len(diffusion.trace["updates"]) == 6
    assert int(module.layer[0].num_batches_tracked) == 24


class Copies(Callback):
    """Keeps a copy of the module, as an average of its weights is one."""

    def setup(self, trainer, pl_module, stage):
        self.copy = copy.deepcopy(pl_module)


def test_a_copy_of_the_module_trains_its_own_weights():
    copies = Copies()
    run(module := Regression(), loader(30), LargeBatchRegime(4), copies)
    weights = module.layer.weight.detach().clone()
    assert torch.equal(copies.copy.configure_optimizers().param_groups[0]["params"][0], copies.copy.layer.weight)
    trainer, trace = run(copies.copy, loader(30))
    assert (trainer.global_step, trace.rates[0]) == (12, [1e-3, 5e-4])
    assert torch.equal(module.layer.weight, weights)
