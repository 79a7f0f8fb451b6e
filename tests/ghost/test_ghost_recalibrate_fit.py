"""Statistics taken anew for evaluation during a fit: what evaluation sees, and that training does not notice."""

import copy
import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset
from torchmetrics import MeanMetric

from lightning_gap.ghost import GhostBatchNorm, convert_ghost_batchnorm, recalibrate_batchnorm

TIGHT = {"rtol": 1e-10, "atol": 1e-12}


class Net(LightningModule):
    """It keeps what people keep: logs, lists, counters, metrics, a queue; and it draws random numbers."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 6),
            nn.BatchNorm1d(6),
            nn.Tanh(),
            nn.Dropout(0.3),
            nn.Linear(6, 3),
            nn.BatchNorm1d(3, momentum=None),
        ).double()
        self.metric, self.losses, self.steps, self.seen = MeanMetric(), [], 0, []
        self.register_buffer("queue", torch.zeros(3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x + 0.01 * torch.randn_like(x)), y)
        self.log("loss", loss, on_epoch=True)
        self.log_dict({"twice": 2 * loss})
        self.metric.update(loss.detach())
        self.losses.append(float(loss.detach()))
        self.steps += 1
        self.queue = torch.cat((self.queue[1:], loss.detach()[None].float()))
        return loss

    def statistics(self):
        return {name: value.clone() for name, value in self.net.state_dict().items() if "running" in name}

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.seen.append(self.statistics())
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Augmented(Dataset):
    """Samples that each source of random numbers changes."""

    def __init__(self, n=48):
        self.x = torch.randn(n, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x = self.x[index] + 0.01 * torch.rand(4) + 0.01 * random.random() + 0.01 * np.random.rand()  # noqa: NPY002
        return x, x[:3].sin()


class Stream(IterableDataset):
    """It goes on where it was, as streams from a disk do."""

    def __init__(self):
        self.data, self.at = Augmented(480), 0

    def __iter__(self):
        for _ in range(48):
            self.at += 1
            yield self.data[self.at % 480]


def with_own_generator():
    generator = torch.Generator().manual_seed(3)
    data = Augmented()
    return DataLoader(data, 12, sampler=RandomSampler(data, generator=generator), generator=generator)


class Listed:
    """A loader of no kind that anyone knows."""

    def __init__(self, batches):
        self.batches = list(batches)

    def __iter__(self):
        return iter(self.batches)


LOADERS = {
    "shuffled": lambda: DataLoader(Augmented(), 12, shuffle=True),
    "generator": with_own_generator,
    "stream": lambda: DataLoader(Stream(), 12),
    "workers": lambda: DataLoader(Augmented(), 12, shuffle=True, num_workers=1, persistent_workers=True),
    "own kind": lambda: Listed(DataLoader(Augmented(), 12)),
    "two": lambda: {"a": DataLoader(Augmented(), 12, shuffle=True), "b": DataLoader(Augmented(), 12)},
}


class Two(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(
            [torch.cat(parts) for parts in zip(batch["a"], batch["b"], strict=True)], batch_idx
        )


def held_out():
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return DataLoader(TensorDataset(x, x[:, :3]), 8)


def fit(model, loader, *callbacks, validated=True, ckpt_path=None, **options):
    defaults = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 2, "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    trainer = Trainer(callbacks=list(callbacks), **defaults | options)
    trainer.fit(model, loader, held_out() if validated else None, ckpt_path=ckpt_path)
    return trainer


def build(kind=Net):
    seed_everything(0, verbose=False)
    return kind()


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("name", LOADERS)
def test_training_does_not_notice(name, validated):
    runs = []
    for recalibrate in (None, 2):
        model = build(Two if name == "two" else Net)
        if not validated:
            model.validation_step = None
        callback = GhostBatchNorm(4, recalibrate=recalibrate)
        options = {"val_check_interval": 2} if validated and name == "shuffled" else {}
        trainer = fit(model, LOADERS[name](), callback, validated=validated, **options)
        loss = {key: value for key, value in trainer.callback_metrics.items() if not key.startswith("val")}
        runs.append((model, loss, torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()))  # noqa: NPY002
    (plain, *before), (model, *after) = runs
    torch.testing.assert_close(before[0], after[0], rtol=0, atol=0)
    assert torch.equal(before[1], after[1])
    assert before[2:] == after[2:]
    assert (model.losses, model.steps) == (plain.losses, plain.steps)
    assert torch.equal(model.metric.compute(), plain.metric.compute())
    for name_, value in model.state_dict().items():
        same = torch.equal(value, plain.state_dict()[name_])
        assert same != ("running" in name_ or name_ == "net.5.num_batches_tracked"), name_
    assert "log" not in vars(model)


def plain_loader():
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return DataLoader(TensorDataset(x, x[:, :3].sin()), 12)


class Quiet(Net):
    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])


STAGES = []  # what a module keeps itself is put back


class Staged(Quiet):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        STAGES.append(self.trainer.training)
        return batch


class Averages(Callback):
    """The averages that a plain calculation gives for the weights that validation sees."""

    def __init__(self):
        self.expected = []

    def on_validation_end(self, trainer, pl_module):
        twin = convert_ghost_batchnorm(copy.deepcopy(pl_module.net), 4)
        recalibrate_batchnorm(twin, plain_loader(), max_batches=3)
        self.expected.append({name: value for name, value in twin.state_dict().items() if "running" in name})


def test_validation_and_checkpoints_have_the_averages(tmp_path):
    STAGES.clear()
    model, averages = build(Staged), Averages()
    saved = ModelCheckpoint(tmp_path, save_last=True)
    fit(model, plain_loader(), GhostBatchNorm(4, recalibrate=3), averages, saved, num_sanity_val_steps=0)
    assert len(model.seen) == 2
    for seen, expected in zip(model.seen, averages.expected, strict=True):
        torch.testing.assert_close(seen, expected, **TIGHT)
    assert (sum(STAGES), len(STAGES)) == (2 * (4 + 3), 2 * (4 + 3 + 1))  # and 1 of validation
    state = torch.load(saved.last_model_path, weights_only=True)["state_dict"]
    for name, value in model.seen[-1].items():
        assert torch.equal(state[f"net.{name}"], value)
        assert torch.equal(model.net.state_dict()[name], value)
    assert int(model.net[1].num_batches_tracked) == 2 * 12


def test_without_validation_the_end_of_an_epoch_has_them(tmp_path):
    model = build(Quiet)
    saved = ModelCheckpoint(tmp_path, save_last=True)
    model.validation_step = None
    fit(model, plain_loader(), GhostBatchNorm(4, recalibrate=3), saved, validated=False)
    twin = convert_ghost_batchnorm(copy.deepcopy(model.net), 4)
    recalibrate_batchnorm(twin, plain_loader(), max_batches=3)
    state = torch.load(saved.last_model_path, weights_only=True)["state_dict"]
    for name, value in twin.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(state[f"net.{name}"], value, **TIGHT)


@pytest.mark.parametrize("validated", [True, False])
def test_how_often(validated):
    """With validation every second epoch: there, and when the fit ends; without, in each epoch."""

    class Counting(Staged):
        def validation_step(self, batch, batch_idx):
            pass

    model = build(Counting)
    if not validated:
        model.validation_step = None
    STAGES.clear()
    fit(
        model, plain_loader(), GhostBatchNorm(4, recalibrate=3), validated=validated, max_epochs=3,
        check_val_every_n_epoch=2, num_sanity_val_steps=0,
    )  # fmt: skip
    assert sum(STAGES) == 3 * 4 + (2 * 3 if validated else 3 * 3)
    twin = convert_ghost_batchnorm(copy.deepcopy(model.net), 4)
    recalibrate_batchnorm(twin, plain_loader(), max_batches=3)
    for name, value in twin.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(model.net.state_dict()[name], value, **TIGHT)


class Still(Quiet):
    """Without dropout: a checkpoint holds no state of random numbers."""

    def __init__(self):
        super().__init__()
        self.net[3].p = 0.0


def test_resume_is_exact(tmp_path):
    def saving(folder):
        return ModelCheckpoint(tmp_path / folder, save_last=True)

    def loader():
        return DataLoader(plain_loader().dataset, 12)

    whole, resumed, saved = build(Still), build(Still), saving("half")
    fit(whole, loader(), GhostBatchNorm(4, recalibrate=2), saving("whole"), max_epochs=4)
    fit(build(Still), loader(), GhostBatchNorm(4, recalibrate=2), saved, max_epochs=2)
    fit(
        resumed, loader(), GhostBatchNorm(4, recalibrate=2), saving("half"), max_epochs=4,
        ckpt_path=saved.last_model_path, num_sanity_val_steps=0,
    )  # fmt: skip
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_frozen_layers_and_those_held_back_keep_their_statistics():
    class Frozen(Quiet):
        def on_train_epoch_start(self):
            self.net[1].eval()

    model = build(Frozen)
    before = copy.deepcopy(model.net[1].state_dict())
    fit(model, plain_loader(), GhostBatchNorm(4, recalibrate=3))
    assert torch.equal(model.net[1].running_mean, before["running_mean"])
    fit(held_back := build(Quiet), plain_loader(), GhostBatchNorm(4, recalibrate=3, skip="net.1"))
    fit(usual := build(Quiet), plain_loader(), GhostBatchNorm(4, skip="net.1"))
    assert torch.equal(held_back.net[1].running_mean, usual.net[1].running_mean)
    assert not torch.equal(held_back.net[5].running_mean, usual.net[5].running_mean)


def test_what_cannot_be_recalibrated_is_refused_when_fit_starts():
    class Manual(Quiet):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(MisconfigurationException, match="manual optimization that would train: use recalibrate=None"):
        fit(build(Manual), plain_loader(), GhostBatchNorm(4, recalibrate=3))

    class OneShot:
        def __init__(self):
            self.batches = (batch for batch in plain_loader())

        def __iter__(self):
            return self.batches

    with pytest.raises(MisconfigurationException, match=r"this one cannot be copied \(.*generator.*map-style"):
        fit(build(Quiet), OneShot(), GhostBatchNorm(4, recalibrate=3))
    for wrong, error in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="recalibrate must be"):
            GhostBatchNorm(4, recalibrate=wrong)


def test_a_step_that_needs_gradients_says_where_it_failed():
    class Penalty(Quiet):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss + torch.autograd.grad(loss, self.net[0].weight, create_graph=True)[0].square().sum()

    with pytest.raises(RuntimeError, match="does not require grad") as caught:
        fit(build(Penalty), plain_loader(), GhostBatchNorm(4, recalibrate=3), num_sanity_val_steps=0)
    assert any("recalibrate" in note for note in caught.value.__notes__)


class ByStep(Quiet):
    def training_step(self, batch, batch_idx):
        self.log("loss", 0.0)
        self.losses.append(batch_idx)
        return self.net(batch["x"] if isinstance(batch, dict) else batch[0]).sum()


def test_modules_of_lightning_by_hand():
    model, expected = build(ByStep), build(ByStep)
    recalibrate_batchnorm(expected.net, plain_loader())
    for loader in (plain_loader(), [{"x": x, "y": y} for x, y in plain_loader()]):
        model = build(ByStep)
        recalibrate_batchnorm(model, loader)
        assert model.losses == []
        for name, value in model.net.state_dict().items():
            assert torch.equal(value, expected.net.state_dict()[name])
    with pytest.raises(TypeError, match=r"dictionary with \['x'\].*forward=lambda batch: module\(batch\['x'\]\)"):
        recalibrate_batchnorm(model.net, [{"x": torch.zeros(4, 4)}])
    model.automatic_optimization = False
    with pytest.raises(ValueError, match=r"manual optimization.*forward="):
        recalibrate_batchnorm(model, plain_loader())
    for name, value in model.net.state_dict().items():
        assert torch.equal(value, expected.net.state_dict()[name])
