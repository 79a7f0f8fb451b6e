"""Statistics taken anew under a moving average of the weights: those of the average, which is validated and kept."""

import copy
import json

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gap import BatchSizeSchedule, GhostBatchNorm, LargeBatchRegime, recalibrate_batchnorm
from lightning_gap.ghost import convert_ghost_batchnorm
from lightning_gap.trainer.internals.of_lightning import averaged_model

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*", "ignore:.*configure_model.*", "ignore:.*callbacks used to create.*"
)


def dataset():
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return TensorDataset(x, x[:, :3].sin())


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
        self.seen = []

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.seen.append({name: value.clone() for name, value in self.net.state_dict().items()})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)

    def train_dataloader(self):
        return DataLoader(dataset(), 12)

    def val_dataloader(self):
        return DataLoader(dataset(), 48)


class OfEpochs(WeightAveraging):
    """Averages equally, after each epoch: after its validation."""

    def should_update(self, step_idx=None, epoch_idx=None):
        return epoch_idx is not None


def fit(*callbacks, ckpt_path=None, processes=1, **options):
    seed_everything(0, verbose=False)
    model = Net()
    trainer = Trainer(
        accelerator="cpu", devices=processes, logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        strategy=DDPStrategy(start_method="fork", process_group_backend="gloo") if processes > 1 else "auto",
        **{"max_epochs": 3, **options},
    )  # fmt: skip
    trainer.fit(model, ckpt_path=ckpt_path)
    return model


def check(state):
    """Compare statistics with those of the same weights over the same batches."""
    twin = convert_ghost_batchnorm(copy.deepcopy(Net().net), 4)
    twin.load_state_dict(state)
    recalibrate_batchnorm(twin, DataLoader(dataset(), 12), max_batches=3)
    for name, value in twin.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(state[name], value, **TIGHT)


@pytest.mark.parametrize("make", [lambda: EMAWeightAveraging(decay=0.8), OfEpochs], ids=["moving", "of epochs"])
@pytest.mark.parametrize("first", [True, False], ids=["average first", "average last"])
@pytest.mark.parametrize("every", [1, 2])
def test_the_statistics_are_those_of_the_average(tmp_path, make, first, every):
    ghosts, average, saved = GhostBatchNorm(4, recalibrate=3), make(), ModelCheckpoint(tmp_path, save_last=True)
    mine = (average, ghosts) if first else (ghosts, average)
    model = fit(*mine, saved, check_val_every_n_epoch=every)
    assert len(model.seen) == 3 // every
    for state in model.seen:
        check(state)
    check(model.net.state_dict())  # the average, which is left behind
    for name, value in averaged_model(average).module.net.named_parameters():
        assert torch.equal(model.net.get_parameter(name), value)
    if every == 1 and not isinstance(average, OfEpochs):
        state = torch.load(saved.last_model_path, weights_only=True)["state_dict"]
        check({name.removeprefix("net."): value for name, value in state.items()})


def test_training_does_not_notice():
    class Weights(Callback):
        def __init__(self):
            self.found = []

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.found.append([parameter.detach().clone() for parameter in pl_module.parameters()])

    found = []
    for recalibrate in (3, None):
        weights = Weights()
        fit(GhostBatchNorm(4, recalibrate=recalibrate), EMAWeightAveraging(decay=0.8), weights)
        found.append(weights.found)
    for ours, plain in zip(*found, strict=True):
        for a, b in zip(ours, plain, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "regime",
    [
        lambda: BatchSizeSchedule([(0, 12), (48, 24)]),
        lambda: LargeBatchRegime(6, lr_rule="sqrt", train_longer=False, ema_rule="half_life"),
    ],
    ids=["a batch that grows", "a large batch"],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, regime):
    def callbacks():
        return regime(), GhostBatchNorm(4, recalibrate=2), EMAWeightAveraging(decay=0.8)

    saves = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = fit(*callbacks(), saves)
    for epoch in (0, 1):
        part = fit(*callbacks(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        for name, value in whole.state_dict().items():
            assert torch.equal(value, part.state_dict()[name]), (epoch, name)


class Record(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        state = {name: value.tolist() for name, value in pl_module.net.state_dict().items() if "tracked" not in name}
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(state))


@pytest.mark.distributed
def test_ranks_have_the_average_over_all_of_them(tmp_path):
    ghosts, average = GhostBatchNorm(6, recalibrate=2), EMAWeightAveraging(decay=0.8)
    growing = BatchSizeSchedule([(0, 12), (48, 24)])
    fit(growing, ghosts, average, Record(tmp_path), processes=2)
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one == two
    alone = tmp_path / "alone"
    alone.mkdir()
    model = fit(BatchSizeSchedule([(0, 12), (48, 24)]), GhostBatchNorm(6), EMAWeightAveraging(decay=0.8))
    for name, parameter in model.net.named_parameters():
        torch.testing.assert_close(parameter.detach(), torch.tensor(one[name], dtype=torch.float64))
